"""Suites on builtin:tiny, and what they say of rows made up for the purpose."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpolicy.errors import UsageError
from kvpolicy.lab.compare.arms import FULL, arms
from kvpolicy.lab.compare.rows import Row
from kvpolicy.lab.compare.running import Options
from kvpolicy.lab.fidelity.full_cache import Forced
from kvpolicy.lab.suites import evidence, kept, raas, running
from kvpolicy.lab.suites.accuracy import BUDGETS, Accuracy, Axis, Claim, Marks
from kvpolicy.lab.suites.arms import arm, quest, series
from kvpolicy.lab.suites.base import Lab
from kvpolicy.lab.suites.claims import Kind, Word
from kvpolicy.lab.suites.cost import Cost
from kvpolicy.lab.suites.page import origin, page, pictures
from kvpolicy.lab.suites.places import by_place
from kvpolicy.lab.suites.running import SUITES, Outcome, file_of, outcome, run, suite_named
from kvpolicy.lab.tasks.registry import task_named
from kvpolicy.models import load_model


@pytest.fixture(scope="module")
def lab() -> Lab:
    model, tokenizer = load_model("builtin:tiny")
    return Lab.of(model, tokenizer, "builtin:tiny", task_named("phrase"), Options(2, size=60, new_tokens=24))


def quiet(done: int, total: int, what: str) -> None:
    """Nobody listens."""


# What is declared ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_whole(name: str, lab: Lab) -> None:
    """Names are unique, arms load and are told apart, and every claim is about series that run."""
    suite = suite_named(name)
    names = [each.name for each in suite.experiments]
    assert suite.name == name and len(set(names)) == len(names) and all(each.startswith(name) for each in names)
    ran: dict[str, set[str]] = {}
    for each in suite.experiments:
        assert each.title and each.paper and (each.same is None or each.same in names)
        if isinstance(each, Accuracy):
            made = each.arms(lab)
            assert made[0].label == FULL
            assert len({(one.label, one.budget) for one in made}) == len(made)
            ran[each.name] = {series(one.label) for one in made}
        for claim in getattr(each, "claims", ()):
            known = ran[each.same or each.name]
            assert {claim.ours, claim.theirs, claim.where or FULL} <= known


def test_lengths_and_budgets_are_those_of_the_task(lab: Lab) -> None:
    assert (lab.prompt, lab.new) == (61, 24) and lab.page == 4
    assert lab.budgets == (12, 20, 32, 44, 64)
    assert quest(lab) == "quest-all-layers"  # builtin:tiny has two layers, which Quest leaves whole
    assert arm(lab, "r-kv", 28).given == {"buffer": "3", "window": "3"}
    assert arm(lab, "streaming-llm", 28).given == {"sinks": "4"} and arm(lab, "window", 28).given == {}
    assert arm(lab, "raas", 28, page_size=2, touch="10%").given == {"page_size": "2", "touch": "10%"}


def test_every_machine_that_made_rows_is_named(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a run that was cut short stay, so who goes on elsewhere must not say that all are its own."""
    monkeypatch.setattr(raas, "TOUCHES", ("10%", "50%"))
    here = {"kvpolicy": "1", "python": "3", "torch": "2", "transformers": "5", "threads": 1}

    def made_on(device: str, only: list[str]) -> Outcome:
        monkeypatch.setattr(running, "machine", lambda lab: {**here, "device": device, "date": "2026-01-01 00:00 UTC"})
        return run(suite_named("raas"), lab, tmp_path, only=only, tell=quiet, command="c")

    def cut(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(kept.Kept, "measure", cut)
        with pytest.raises(KeyboardInterrupt):
            made_on("one", ["raas-touch", "raas-kept"])
    made_on("another", ["raas-touch"])  # which has nothing to do
    told = made_on("a third", ["raas-touch", "raas-kept"])
    assert [each["device"] for each in told.about["machines"]] == ["one", "a third"]
    said = origin(told.about)
    assert "one, 1 thread" in said and "a third, 1 thread" in said


# A run --------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_and_can_be_told_again(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(raas, "TOUCHES", ("10%", "50%"))
    suite, only = suite_named("raas"), ["raas-touch", "raas-kept"]
    told = run(suite, lab, tmp_path, only=only, tell=quiet, command="c")
    assert list(told.found) == only and told.about["model"] == "builtin:tiny" and told.about["limit"] == 24
    path = file_of(suite.experiment("raas-touch"), tmp_path)
    rows = path.read_text().splitlines()
    assert len(rows) == 2 * 3 and {json.loads(row)["label"] for row in rows} >= {FULL, "raas, touch 50%"}
    assert [len(panel.lines) for panel in told.found["raas-touch"].panels] == [1]
    assert [len(heat.cells) for heat in told.found["raas-kept"].heats] == [24] * 3
    again = run(suite, lab, tmp_path, only=only, tell=quiet, command="c")
    assert path.read_text().splitlines() == rows
    assert (
        again.to_dict()["experiments"]
        == told.to_dict()["experiments"]
        == outcome(suite, tmp_path).to_dict()["experiments"]
    )
    drawn = pictures(told)
    assert set(drawn) == set(only) and all(data.startswith(b"\x89PNG") for data in drawn.values())
    text = page(told)
    assert "<script" not in text and "http" not in text.replace("http-equiv", "") and text.count("<svg") > 3
    assert again.about["machines"] == told.about["machines"]
    other = replace(lab, options=replace(lab.options, seed=1))
    with pytest.raises(UsageError, match="holds another run: its seed is 0, and now 1"):
        run(suite, other, tmp_path, only=only, tell=quiet, command="c")


def test_experiments_share_their_rows(lab: Lab, tmp_path: Path) -> None:
    """An arm that an earlier experiment ran is copied, not run again."""
    first = Accuracy("a", "t", "p", lambda lab: raas.compared(lab)[:1])
    second = Accuracy("b", "t", "p", lambda lab: raas.compared(lab)[:1])
    first.measure(lab, tmp_path / "a.jsonl", [], quiet)
    said: list[tuple[int, int]] = []
    second.measure(
        lab, tmp_path / "b.jsonl", [tmp_path / "a.jsonl"], lambda done, total, what: said.append((done, total))
    )
    assert said == [(0, 0)] and (tmp_path / "b.jsonl").read_text() == (tmp_path / "a.jsonl").read_text()


def test_what_makes_no_sense_is_refused(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean `raas`"):
        suite_named("rass")
    with pytest.raises(UsageError, match="--only 'raas-tuch'"):
        run(suite_named("raas"), lab, tmp_path, only=["raas-tuch"], tell=quiet, command="c")
    with pytest.raises(UsageError, match="holds no run of a suite"):
        outcome(suite_named("raas"), tmp_path / "nothing")


def test_positions_are_those_that_are_held(lab: Lab) -> None:
    """A window of 20 after s steps: the newest 20 tokens, in every layer and head."""
    (window,) = [each for each in arms([], [20]) if each.label == "window"]
    text = Forced(0, torch.arange(5, 45), torch.arange(5, 13))
    row = kept.course(lab, window, text)
    assert row["tokens"] == 47 and row["steps"] == 8 == len(row["cells"])
    for step, cells in enumerate(row["cells"]):
        known = 40 + step
        expected = [None if token >= known else float(token >= known - 20) for token in range(47)]
        assert cells == expected
    assert row["of_prompt"][0] == 1.0 and row["of_prompt"][-1] == pytest.approx(13 / 20)


# What must hold of an evaluator -------------------------------------------------------------------------------------


def metamorphic(lab: Lab, tmp_path: Path, names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(evidence, "POLICIES", tuple(names))
    checks = evidence.Metamorphic()
    assert checks.measure(lab, tmp_path / "rows.jsonl", [], quiet) == []
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == {FULL, *names}
    return checks.tell(rows).findings


def test_room_for_everything_is_the_full_cache(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = metamorphic(lab, tmp_path, ["raas", "h2o", "scope-adaptive"], monkeypatch)
    assert [each.word for each in findings] == [Word.HOLDS, Word.HOLDS]


@pytest.mark.slow
def test_room_for_everything_is_the_full_cache_for_all(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = metamorphic(lab, tmp_path, evidence.POLICIES, monkeypatch)
    assert [each.word for each in findings] == [Word.HOLDS, Word.HOLDS]


def test_the_checks_can_fail(lab: Lab) -> None:
    """Another output, and labels that fit every item."""
    rows = [told(FULL, None, n, [True] * 4) for n in range(8)]
    other = [replace(row, label="h2o", output="else", digest="h") for row in rows]
    (alike,) = evidence._like_the_full_cache([*rows, *other], rows)
    assert alike.word is Word.FAILS and "h2o" in alike.where

    class Everything(type(task_named("phrase"))):  # type: ignore[misc]
        def grade(self, item: Any, output: str, *, cut: bool = False) -> tuple[bool, ...]:
            return (True, True)

    assert evidence.shuffled(Everything(), rows).word is Word.FAILS


def test_a_score_that_falls_with_the_budget_is_named() -> None:
    full = [told(FULL, None, n, [True] * 8) for n in range(12)]
    rows = [
        told("h2o", budget, n, [place < count for place in range(8)])
        for budget, count in ((16, 4), (32, 6), (64, 2))
        for n in range(12)
    ]
    (finding,) = evidence.Rising().tell([row.to_dict() for row in (*full, *rows)]).findings
    assert finding.word is Word.FAILS and "h2o from 32 to 64" in finding.where and "16" not in finding.where
    rising = [row for row in rows if row.budget != 64]
    assert evidence.Rising().tell([row.to_dict() for row in (*full, *rising)]).findings[0].word is Word.HOLDS


# What rows say ------------------------------------------------------------------------------------------------------


def told(label: str, budget: int | None, number: int, right: list[bool], **settings: str) -> Row:
    return Row(
        model="m", dtype="float32", label=label, digest=label, budget=budget, settings=settings, held=9, task="phrase",
        size=60, seed=0, number=number, prompt=f"{number}", limit=12, right=tuple(right), output="x", prompt_tokens=40,
        new_tokens=8, evicted=0 if label == FULL else 5,
    )  # fmt: skip


def marks(scores: dict[tuple[str, int], list[int]], axis: Axis = BUDGETS) -> Marks:
    """Rows of eight answers, of which the first so many are right, item by item, twice over."""
    rows = [told(FULL, None, number, [True] * 8) for number in range(16)]
    rows += [
        told(label, budget, number, [place < count for place in range(8)])
        for (label, budget), counts in scores.items()
        for number, count in enumerate(counts * 2)
    ]
    return Marks(rows, axis)


def test_claims_are_judged_place_by_place() -> None:
    found = marks({
        ("raas", 64): [8, 8, 8, 8, 8, 8, 8, 8], ("h2o", 64): [4, 3, 4, 5, 4, 4, 3, 5],
        ("raas", 32): [2, 3, 2, 2, 3, 2, 2, 2], ("h2o", 32): [2, 2, 3, 2, 2, 3, 2, 2],
    })  # fmt: skip
    some = Claim("s", Kind.NEAR, "raas", every=False)
    assert some.judged(found).word is Word.HOLDS and replace(some, every=True).judged(found).word is Word.FAILS
    above = Claim("s", Kind.ABOVE, "raas", "h2o")
    assert above.judged(found).word is Word.OPEN and "holds at 1, cannot be told at 1 of 2 places" in str(
        above.judged(found)
    )
    assert replace(above, at=lambda place, prompt: place > prompt).judged(found).word is Word.HOLDS
    off = Claim("s", Kind.BELOW, "h2o", where="raas").judged(found)
    assert off.word is Word.HOLDS and "64: -50.0 points" in off.where and "32" not in off.where
    assert "did not run" in Claim("s", Kind.ABOVE, "tova", "h2o").judged(found).where


def test_late_answers_are_judged_by_themselves() -> None:
    found = marks({("a", 64): [7, 6, 7, 6, 7, 6, 7, 6], ("b", 64): [6, 6, 6, 6, 6, 6, 6, 6]})
    late = next(each for _, each in found.differences("a", "b", True))
    whole = next(each for _, each in found.differences("a", "b", False))
    assert late.difference == pytest.approx(0.25) and whole.difference == pytest.approx(1 / 16)
    shares = [each.share for each in by_place(found.of["a", 64])]
    assert shares == [1.0, 1.0, 1.0, 0.25]


def test_a_full_cache_that_fails_says_nothing() -> None:
    found = marks({("raas", 64): [8] * 8})
    found.full = [replace(row, right=(False,) * 8) for row in found.full]
    finding = Claim("s", Kind.NEAR, "raas").judged(found)
    assert finding.word is Word.OPEN and "right only 0% of the time" in finding.where


def test_arms_that_did_nothing_are_left_out() -> None:
    rows = [told(FULL, None, n, [True] * 8) for n in range(8)]
    rows += [replace(told("raas", 64, n, [True] * 8), evicted=0) for n in range(8)]
    assert Marks(rows, BUDGETS).names == []


def test_a_param_is_an_axis_and_so_is_a_share_of_the_prompt() -> None:
    axis = Axis("alpha", of_prompt=True)
    assert axis.place({"alpha": "10"}, 64, 40) == 0.25 and axis.words(0.25) == "25 %"
    assert Axis("page_size").place({"page_size": "16"}, 64, 40) == 16 and Axis("page_size").place({}, None, 40) is None
    assert Axis("alpha").words(0.0001) == "0.0001" and BUDGETS.words(1024) == "1,024"


def test_cost_is_told_in_ratios_of_one_run() -> None:
    def row(label: str, context: int, ms: float, size: int, ratio: float | None = None) -> dict[str, Any]:
        return {"label": label, "context": context, "ms": ms, "ratio": ratio, "bytes": size, "compiled": True}

    rows = []
    for context, full_ms in ((512, 2.0), (1024, 4.0), (2048, 8.0)):
        rows += [row(FULL, context, full_ms, 100 * context), row("raas", context, 2.0, 40_000, full_ms / 2.0)]
    found = Cost("c", "t", "p", lambda lab: [], flat=("raas",)).tell(rows)
    assert [each.word for each in found.findings] == [Word.HOLDS, Word.HOLDS]
    time, memory = found.panels
    assert [round(point.value, 3) for point in memory.lines[0].points] == [0.781, 0.391, 0.195]
    spent = [384 * 2.0, 896 * 2.0, 1920 * 2.0]
    base = [384 * 2.0, 384 * 2.0 + 512 * 4.0, 384 * 2.0 + 512 * 4.0 + 1024 * 8.0]
    assert [point.value for point in time.lines[0].points] == pytest.approx(
        [one / other for one, other in zip(spent, base, strict=True)]
    )
    grown = [{**each, "bytes": 100 * each["context"], "ratio": each["ratio"] and 1.0} for each in rows]
    words = [each.word for each in Cost("c", "t", "p", lambda lab: [], flat=("raas",)).tell(grown).findings]
    assert words == [Word.FAILS, Word.OPEN]
