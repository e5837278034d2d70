"""Fidelity of arms on the texts of a file: rows, how they are taken up again, and what is said of them."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.errors import ModelError, UsageError
from kvpolicy.lab.compare.arms import Arm, arms
from kvpolicy.lab.compare.rows import read
from kvpolicy.lab.dataset import Text
from kvpolicy.lab.fidelity.__main__ import main
from kvpolicy.lab.fidelity.measuring import Fidelity, Options
from kvpolicy.lab.fidelity.panels import by_budget, by_place
from kvpolicy.lab.fidelity.picture import picture
from kvpolicy.lab.fidelity.report import doubts, entries, table
from kvpolicy.lab.suites import long_outputs
from kvpolicy.language import load_policy
from kvpolicy.models import load_model
from kvpolicy.models.tiny.task import make_problem


@cache
def tiny() -> tuple[Any, Any]:
    return load_model("builtin:tiny")


def texts(count: int = 3) -> list[Text]:
    problems = [make_problem(number, words=8, hums=24 + number) for number in range(count)]
    return [
        Text(number, each.prompt, " " + " ".join(each.answer(72)), f"line {number + 1}")
        for number, each in enumerate(problems)
    ]


def run_of(path: Path | None = None, said: list[str] | None = None, **options: Any) -> Fidelity:
    heard = [] if said is None else said
    return Fidelity(*tiny(), "tiny", Options(**options), path, lambda done, total, what: heard.append(what))


@cache
def measured() -> Fidelity:
    run = run_of(batch=2)
    roomy = load_policy("h2o", set={"heavy": 100, "recent": 100})  # by its own params it drops nothing
    run.run(arms([("h2o", roomy, {})], [24, None]), texts())
    return run


def test_every_text_is_a_row_for_every_arm() -> None:
    rows = measured().rows
    assert {(row.label, row.budget, row.number) for row in rows if row.label in ("dense", "h2o")} == {
        (label, budget, number)
        for label, budget in (("dense", None), ("h2o", 24), ("h2o", None))
        for number in range(3)
    }
    assert {"window", "random-unpinned"} <= {row.label for row in rows}
    for row in rows:
        assert row.task == "fidelity" and not row.right and row.new_tokens == 72
        assert row.measures["positions"] == [0, 64] and row.measures["places"] == [64, 8]
        assert row.measures["mass_places"] == [4, 1] and all(0 < mass <= 1 for mass in row.measures["mass"])
        assert row.worked == (row.budget == 24) == (min(row.measures["mass"]) < 0.999)


def test_the_report_holds_arms_against_the_full_cache() -> None:
    found = {(entry.label, entry.budget): entry for entry in entries(measured().rows)}
    full, small, large = found["dense", None], found["h2o", 24], found["h2o", None]
    assert full.said["kl"]["value"] < 1e-6 and full.said["top1"]["value"] == 1
    assert small.said["kl"]["value"] > 0.01 and small.said["perplexity"]["value"] > full.said["perplexity"]["value"]
    assert small.said["kl"]["low"] < small.said["kl"]["value"] < small.said["kl"]["high"]
    for curve in small.said["curves"].values():
        assert [(part["from"], part["to"]) for part in curve] == [(0, 64), (64, 72)]
    assert full.said["mass"]["value"] == pytest.approx(1, abs=1e-6)
    assert small.said["mass"]["low"] < small.said["mass"]["value"] < 0.9
    assert any("h2o never evicted" in doubt for doubt in doubts(list(found.values())))
    assert any("h2o holds more" in doubt and "30 tokens at 24" in doubt for doubt in doubts([replace(small, held=30)]))
    assert not any("holds more" in doubt for doubt in doubts(list(found.values())))
    lines = {line[:2]: line for line in table([full, small, large])}
    assert lines["h2o", "–"][3] == "never evicted"
    assert lines["h2o", "24"][4].endswith("%)")
    with pytest.raises(UsageError, match="no rows of fidelity"):
        entries([])


def test_a_run_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    path, said = tmp_path / "rows.jsonl", []
    asked = [Arm("dense", load_policy("dense"), None), Arm("h2o", load_policy("h2o"), 24)]
    run_of(path, batch=2).run(asked, texts(2))
    before = path.read_text().splitlines()
    again = run_of(path, said, batch=2)
    again.run(asked, texts(3))
    found = entries(read(path))
    assert [(entry.said["texts"], entry.said["places"]) for entry in found] == [(3, 216)] * 2 and len(table(found)) == 2
    assert [panel.places for panel in by_place(found, 24)] == [("64", "72")] * 3
    assert [line.label for panel in by_budget(found) for line in panel.lines] == ["h2o"] * 3
    packed = tmp_path / "fidelity.jsonl"
    packed.write_bytes(path.read_bytes())
    said_of = "\n".join(long_outputs.section(tmp_path))
    assert "So far 3 of 20 texts." in said_of and "| h2o | 24 |" in said_of
    assert all(name in said_of for name in long_outputs.drawings(tmp_path))
    assert [*long_outputs.section(tmp_path / "none")] == [long_outputs.NOTHING]
    assert again.taken_up == len(before) == 4
    assert path.read_text().splitlines()[:4] == before
    assert len(read(path)) == len(again.rows) == 6
    assert not any("128 of" in line for line in said), "texts that were done ran again"


def test_a_policy_has_one_colour_in_all_panels() -> None:
    order = ["dense", "streaming-llm", "h2o", "window", "tova"]
    rows = [replace(row, label=label) for label in order for row in measured().rows if row.label == "h2o"]
    rows = [row for row in rows if row.budget == 24 or row.label != "streaming-llm"]
    found = entries([replace(row, budget=48, evicted=1) if row.budget is None else row for row in rows])
    panels = [*by_budget(found), *by_place(found, 24), *by_place(found, 48)]
    looks = {(line.label, line.colour, line.marker, line.control) for panel in panels for line in panel.lines}
    assert len(panels) == 9 and {look[0] for look in looks} == set(order[1:]) and len(looks) == 4
    assert [look[3] for look in looks if look[0] == "window"] == [True]


def test_there_is_a_picture_even_where_nothing_was_dropped() -> None:
    shown = by_budget(found := entries(measured().rows))
    assert all(panel.lines for panel in shown) and len(picture("tiny", found)) > 10_000
    idle = [entry for entry in found if not entry.worked]
    assert idle and not by_budget(idle)
    assert picture("tiny", idle).startswith(b"\x89PNG")


def test_another_output_of_the_same_prompt_is_another_row(tmp_path: Path) -> None:
    path, asked = tmp_path / "rows.jsonl", [Arm("dense", load_policy("dense"), None)]
    (text,) = texts(1)
    run_of(path).run(asked, [text])
    run_of(path).run(asked, [Text(0, text.prompt, text.output + " owl red", text.place)])
    assert len(read(path)) == 2


def test_arms_that_cannot_have_their_budget_are_named() -> None:
    run = run_of()
    run.run([Arm("dense", load_policy("dense"), None), Arm("raas", load_policy("raas"), 16)], texts(1))
    assert "raas" in run.refused["fidelity", "raas", 16]
    assert {row.label for row in run.rows} == {"dense"}


def test_texts_that_cannot_be_read_are_refused() -> None:
    asked = [Arm("dense", load_policy("dense"), None)]
    with pytest.raises(UsageError, match="line 1: there is nothing after the prompt"):
        run_of().run(asked, [Text(0, "owl", "", "line 1")])
    with pytest.raises(ModelError, match="this model knows 65536 positions"):
        run_of().run(asked, [Text(0, "owl", " red" * 66_000, "line 1")])


def test_the_script_prints_a_table_and_writes_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, told = tmp_path / "texts.jsonl", tmp_path / "report.json"
    data.write_text("".join(json.dumps({"prompt": each.prompt, "pred": each.output}) + "\n" for each in texts(2)))
    small = ["--model", "builtin:tiny", "--new-tokens", "20", "--budgets", "24"]
    assert main(["h2o", "--dataset", str(data), "--json", str(told), *small]) == 0
    shown = capsys.readouterr()
    assert "h2o" in shown.out and "random-unpinned" in shown.out
    assert "2 texts: intervals say how these vary" in shown.err
    assert {entry["label"] for entry in json.loads(told.read_text())} >= {"dense", "h2o", "window"}
    assert main(["h2o", "--dataset", str(tmp_path / "none.jsonl"), *small]) == 2
    assert main(["h2o", "--dataset", str(data), "--budgets", "many"]) == 2
    assert "no list of numbers" in capsys.readouterr().err
