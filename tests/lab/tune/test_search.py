"""A search on the built-in model: recorded attention is the oracle's, what is chosen is measured, and runs repeat."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from kvpolicy.lab.dataset import Text
from kvpolicy.lab.fidelity.full_cache import Forced, force_ids
from kvpolicy.lab.recording import layers_of
from kvpolicy.lab.tune.goal import Goal
from kvpolicy.lab.tune.measured import Bench, Measured
from kvpolicy.lab.tune.picture import picture
from kvpolicy.lab.tune.report import remarks, table, to_dict
from kvpolicy.lab.tune.search import Options, Tuning, not_reached, tune
from kvpolicy.lab.tune.sizing import Lengths
from kvpolicy.lab.tune.traced import Traced, kept, record_text
from kvpolicy.lab.tune.writing import tuned
from kvpolicy.language import load_policy, loads_policy
from kvpolicy.language.library import fetch
from kvpolicy.models import load_model
from kvpolicy.models.tiny.task import make_problem

QUICK = Options(trials=5, runs=3, played=24)


@cache
def tiny() -> tuple[Any, Any]:
    return load_model("builtin:tiny")


@cache
def text() -> Forced:
    """22 tokens of prompt and 24 after it."""
    problem = make_problem(0, words=5, hums=15)
    return force_ids(tiny()[1], Text(0, problem.prompt, " " + " ".join(problem.answer(24)), "here"), most=None)


@cache
def searched(memory: int | None = None, agreement: float | None = None) -> Tuning:
    goal = Goal(memory, agreement)
    return tune(*tiny(), "builtin:tiny", load_policy("h2o"), [("here", text())], goal, QUICK)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    path = tmp_path_factory.mktemp("traces") / "text.safetensors"
    record_text(*tiny(), "builtin:tiny", text(), path, (1,))
    return Traced.of(path, layers_of(tiny()[0], ()), 12)


def test_with_room_for_everything_nothing_is_lost(traced: Traced) -> None:
    found = kept(load_policy("dense"), [traced], Lengths((22, 22), 24))
    assert found.error == pytest.approx(0, abs=1e-12)
    assert found.mass == pytest.approx(1)
    assert found.tokens == 12


def test_what_is_lost_is_what_a_window_leaves_out(traced: Traced) -> None:
    """Error and mass of a window, computed here from the recorded numbers alone."""
    found = kept(load_policy("window").bind(window=6), [traced], Lengths((22, 22), 24))
    queries, keys, values = (
        np.asarray(rows[0][1], dtype=float) for rows in (traced.said.queries, traced.said.keys, traced.said.values)
    )
    wrong, whole, mass = 0.0, 0.0, []
    for step in range(12):
        at = 22 + step
        for head in range(4):
            logits = queries[head, at] @ keys[head // 2, : at + 1].T * traced.said.scale
            paid = np.exp(logits - logits.max())
            answer = paid / paid.sum() @ values[head // 2, : at + 1]
            near = paid[at - 6 :]
            wrong += ((near / near.sum() @ values[head // 2, at - 6 : at + 1] - answer) ** 2).sum()
            whole += (answer**2).sum()
            mass.append(near.sum() / paid.sum())
    assert found.error == pytest.approx(wrong / whole, rel=1e-6)
    assert found.mass == pytest.approx(np.mean(mass), rel=1e-6)
    assert found.error > 0.01


def test_only_recorded_layers_are_played(traced: Traced) -> None:
    assert traced.layers == (1,)
    assert traced.said.geometry.layers == 2


def test_the_best_within_a_memory_is_found_and_measured() -> None:
    run = searched(memory=16_000)
    assert run.chosen is not None and run.chosen.bytes <= 16_000
    assert len(run.tried) == 5 and len(run.measured) == 3
    assert all(each.kept is not None for each in run.tried)
    best = max(each.found.agreement.value for each in run.measured if each.bytes <= 16_000)
    assert run.chosen.found.agreement.value == best


def test_what_is_written_is_what_was_measured() -> None:
    run = searched(memory=16_000)
    assert run.chosen is not None
    source, filename = fetch("h2o")
    written = tuned(run, source, filename, "mine", "kvpolicy tune h2o --memory 16000")
    policy = loads_policy(written)
    again = Bench(*tiny(), [text()]).measure(policy)
    assert isinstance(again, Measured)
    assert again.agreement.value == run.chosen.found.agreement.value
    assert again.bytes == run.chosen.bytes
    assert policy.name == "mine"
    head = written.partition("kvpolicy: 1")[0]
    for said in (
        "h2o",
        "builtin:tiny",
        "here",
        "Seed 0",
        f"{run.chosen.bytes:,} bytes",
        "--memory 16000",
        "H2O: a few",
    ):
        assert said in head
    assert all(line.startswith("#") for line in head.splitlines())


def test_the_least_memory_for_an_agreement() -> None:
    run = searched(agreement=0.9)
    assert run.chosen is not None
    assert run.chosen.found.agreement.value >= 0.9
    assert all(each.found.agreement.value < 0.9 for each in run.measured if each.bytes < run.chosen.bytes)


def test_equal_seeds_find_alike() -> None:
    again = tune(*tiny(), "builtin:tiny", load_policy("h2o"), [("here", text())], Goal(memory=16_000), QUICK)
    told = [to_dict(run)["trials"] for run in (searched(memory=16_000), again)]
    assert told[0] == told[1]


def test_what_nothing_reaches_is_told_with_the_best() -> None:
    """Of a cache that is set to four tokens only the temperature is left to search."""
    few = Options(trials=2, runs=2, played=4)
    given = {"budget": "4", "recent": "2"}
    policy, goal = load_policy("keyformer"), Goal(agreement=1)
    run = tune(*tiny(), "builtin:tiny", policy, [("here", text())], goal, few, given=given, only=["temperature"])
    assert run.chosen is None
    assert "the best reached" in str(not_reached(run)) and f"{run.front[-1].bytes:,} bytes" in str(not_reached(run))
    assert not_reached(run).exit_code == 1


def test_a_report_has_every_stage() -> None:
    run = searched(memory=16_000)
    rows, lines = table(run), list(remarks(run))
    assert [row[-1] for row in rows].count("chosen") == 1
    assert "5 settings were played on recorded attention (23 generated tokens, layers 0, 1" in lines[1]
    assert any("no intervals" in line for line in lines)
    told = to_dict(run)
    assert told["chosen"]["number"] in told["front"]
    assert {"recording", "drawing", "recorded attention", "the model"} == set(told["seconds"])


def test_a_picture_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    assert picture(searched(memory=16_000)).startswith(b"\x89PNG")
