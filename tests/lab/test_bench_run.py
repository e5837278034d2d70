"""The benchmark on a tiny model: what its rows say of caches, evictions and references. No number is a time."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvpolicy import load_policy
from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.arms import AGAINST, make_arm
from kvpolicy.lab.bench.capacity import capacities
from kvpolicy.lab.bench.cases import full_cache
from kvpolicy.lab.bench.measuring import Bench, Options, Subject
from kvpolicy.lab.bench.rows import Report, Row
from kvpolicy.lab.bench.seen import growths
from kvpolicy.models import load_model

OPTIONS = Options([256], [64], batches=(2,), steps=16, rounds=4, against=AGAINST)
NAMES = ("raas", "scope-slide", "streaming-llm")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("builtin:tiny", device="cpu")[0]


@pytest.fixture(scope="module")
def report(model: Any) -> Report:
    return Bench(model, [Subject(name, load_policy(name)) for name in NAMES], OPTIONS).run("tiny")


def policies(report: Report) -> Iterator[Row]:
    return (row for row in report.rows if row.is_policy)


def test_every_arm_has_a_row_and_what_cannot_run_says_why(report: Report) -> None:
    assert [row.arm for row in report.rows] == [
        "dense", "dense-at-budget", "hf-dynamic-at-budget", *["policy"] * len(NAMES), "hf-dynamic", "hf-static"
    ]  # fmt: skip
    assert tuple(row.label for row in policies(report)) == NAMES
    assert any(note.startswith("hf-flex is left out") for note in report.notes)


def test_policies_hold_their_budget_and_evict_while_they_are_timed(report: Report) -> None:
    for row in policies(report):
        assert row.timed_steps == 16 and 48 <= row.held <= 64 and row.evicted > 0
        assert {"raas": 64, "scope-slide": 64, "streaming-llm": 64}[row.label] == row.held
    steps = next(row for row in policies(report) if row.label == "streaming-llm")
    assert steps.evicted == 16 * 2 * 2 * 2  # a token for each step, row, layer and KV head of builtin:tiny
    assert set(steps.by_kind) == {"update"}
    assert set(next(policies(report)).by_kind) == {"plain", "update"}  # raas updates where a page opens


def test_bytes_allocated_are_those_of_the_plan(report: Report) -> None:
    for row in report.rows:
        if not row.arm.startswith("hf-dynamic"):  # which allocates a new cache at each step
            assert row.allocated_bytes == pytest.approx(row.planned_bytes, rel=0.002)
        assert row.planned_bytes < row.peak_bytes and row.reserved_bytes is None
    dense, small = report.rows[0], report.rows[1]
    assert dense.step_bytes - report.weight_bytes == 4 * (small.step_bytes - report.weight_bytes)
    assert dense.slots == 256 and small.slots == 64


def test_ratios_are_taken_against_each_reference_of_the_same_turns(report: Report) -> None:
    small = report.rows[1]
    for row in policies(report):
        assert set(row.ratios) == {"dense", "dense-at-budget", "hf-dynamic-at-budget"} == set(row.ideal)
        assert row.ideal["hf-dynamic-at-budget"] == row.ideal["dense-at-budget"]
        assert row.ratios["dense-at-budget"] == pytest.approx(small.ms / row.ms)
        assert row.ideal["dense-at-budget"] == pytest.approx(small.step_bytes / row.step_bytes)
    assert set(report.rows[-1].ratios) == {"dense", "hf-dynamic"}
    assert report.rows[0].ratios == {}


def test_launches_grow_with_layers(report: Report) -> None:
    for row in report.rows:
        assert row.launches is not None and row.launches_per_layer is not None
        assert 0 < row.launches_per_layer < row.launches  # the rest is embedding and head
        assert (row.graphs, row.graph_breaks, row.recompiles) == (0, 0, 0)


def test_a_prompt_that_was_not_read_has_no_time(model: Any) -> None:
    options = Options([256], [64], steps=8, rounds=2, prompt=20, launches=False, against=("dense", "hf-static"))
    rows = Bench(model, [Subject("window", load_policy("window"))], options).run("tiny").rows
    assert [(row.arm, row.prompt, row.prompt_ms is None) for row in rows] == [
        ("dense", 20, True), ("policy", 20, False), ("hf-static", 20, True)
    ]  # fmt: skip
    assert rows[1].evicted == 8 * 2 * 2 and rows[1].launches is None


def test_full_caches_are_filled_to_the_last_slot(model: Any) -> None:
    case = full_cache(load_policy("dense"), 100, Bench(model, [], OPTIONS).shape, batch=2, steps=4, prompt=10)
    arm = make_arm("dense", case, model, compile=False, backend="auto")
    with torch.no_grad():
        arm.build()
        arm.read()
        state = arm.cache.layers[1].state  # type: ignore[attr-defined]
        assert (state.position >= 0).all() and (state.keys.abs().sum(-1) > 0).all()
        for _ in range(case.plan.max_new_tokens):
            assert arm.step() == "plain"
        assert torch.isfinite(arm.stepper.logits).all()  # type: ignore[attr-defined]


def test_graphs_of_other_arms_are_not_counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts for the whole process: what is compiled between two steps of an arm is none of its graphs."""
    counts = iter([(5, 0), (6, 0), (9, 1), (9, 1), (12, 1), (13, 1)])
    monkeypatch.setattr("kvpolicy.lab.bench.arms.graphs_compiled", lambda: next(counts))
    case = full_cache(load_policy("dense"), 60, Bench(model, [], OPTIONS).shape, batch=1, steps=4)
    arm = make_arm("hf-static", case, model, compile=False, backend="auto")
    with torch.no_grad():
        arm.build()
        arm.read()
        arm.step()
        arm.step()
        assert arm.graphs() == {"graphs": 1, "graph_breaks": 0, "recompiles": 0}
        arm.step()
    assert arm.graphs() == {"graphs": 2, "graph_breaks": 0, "recompiles": 1}


def test_a_policy_that_evicts_nothing_is_refused(model: Any) -> None:
    """RaaS drops a page of 16 every 16 steps, and one step is too few."""
    options = Options([256], [64], steps=1, rounds=1, launches=False, against=())
    with pytest.raises(UsageError, match=r"raas evicted nothing in 1 timed steps.*--new-tokens"):
        Bench(model, [Subject("raas", load_policy("raas"))], options).run("tiny")


def test_a_policy_without_a_budget_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="--against dense"):
        Bench(model, [Subject("dense", load_policy("dense"))], OPTIONS)


def test_what_does_not_fit_is_refused_with_numbers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpolicy.lab.bench.measuring.available", lambda device: 500_000)
    bench = Bench(model, [Subject("window", load_policy("window"))], Options([2048], [128], launches=False))
    with pytest.raises(UsageError, match=r"batch 1 at 2,048 tokens needs 1\.8 MB.*0\.5 MB are free.*--force"):
        bench.run("tiny")


def test_the_largest_batch_is_run(model: Any) -> None:
    options = Options([128], [32], steps=4, rounds=2, against=("dense",))
    bench = Bench(model, [Subject("h2o", load_policy("h2o"))], options)
    dense, h2o = capacities(bench, bench.model_bytes + 1_000_000, run=True)
    assert (dense.label, h2o.label) == ("dense", "h2o") and h2o.batch >= 3 * dense.batch > 0
    for row in (dense, h2o):
        assert row.tokens_per_second == pytest.approx(1e3 * row.batch / row.ms)  # type: ignore[operator]
        planned = bench.model_bytes + row.batch * row.sequence_bytes
        assert row.allocated_bytes == pytest.approx(planned, rel=0.01)
    assert h2o.times_dense == pytest.approx(h2o.tokens_per_second / dense.tokens_per_second)  # type: ignore[operator]
    planned_only = list(capacities(bench, bench.model_bytes + 1_000_000, run=False))
    assert planned_only[0].tokens_per_second is None and planned_only[1].batch == h2o.batch


def test_growth_is_each_arm_against_itself(model: Any) -> None:
    options = Options([256], [32], steps=4, rounds=2, against=("dense", "hf-dynamic"))
    rows = growths(Bench(model, [Subject("tova", load_policy("tova"))], options), (150, 300))
    assert [row.label for row in rows] == ["tova", "dense", "hf-dynamic"]
    assert rows[0].evicted == 4 * 2 * 2 and rows[1].evicted == 0
    assert all(row.ratio == pytest.approx(row.ms[1] / row.ms[0]) for row in rows)
