"""The benchmark's bookkeeping: medians by kind, bytes, shares, launches, memory, comparisons. No number is a time."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvpolicy import load_policy
from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.capacity import USABLE, capacity_of
from kvpolicy.lab.bench.cases import full_cache, policy_case
from kvpolicy.lab.bench.compare import compare, load, ratios, save
from kvpolicy.lab.bench.counting import launches
from kvpolicy.lab.bench.memory import gigabytes, measured
from kvpolicy.lab.bench.models import random_model, shallow, twin
from kvpolicy.lab.bench.roofline import share, slot_bytes, token_bytes, weight_bytes
from kvpolicy.lab.bench.rows import Capacity, Growth, Report, Row, reason
from kvpolicy.lab.bench.tables import remarks, tables
from kvpolicy.lab.bench.timing import Steps, take_turns
from kvpolicy.models.shapes import shape_named
from kvpolicy.plan import ModelGeometry

CPU = torch.device("cpu")


def row(**changes: object) -> Row:
    told: dict[str, object] = {
        "arm": "policy", "label": "h2o", "batch": 2, "context": 4096, "budget": 1024, "held": 1024, "slots": 1025,
        "prompt": 4000, "settings": {"heavy": "512"}, "compiled": True, "backend": "torch", "ms": 4.0,
        "quartiles": (3.9, 4.2), "by_kind": {"update": 4.0}, "timed_steps": 64, "prompt_ms": 10.0, "step_bytes": 1000,
        "roofline": 0.8, "planned_bytes": 2000, "allocated_bytes": 2000, "peak_bytes": 2020, "prompt_peak_bytes": 3000,
        "reserved_bytes": None, "launches": 100.0, "launches_per_layer": 9.0, "graphs": 1, "graph_breaks": 0,
        "recompiles": 0, "compile_seconds": 1.0, "evicted": 64, "evicted_before": 10,
        "ratios": {"dense": 1.5, "dense-at-budget": 0.97}, "ideal": {"dense": 2.0, "dense-at-budget": 1.0},
    }  # fmt: skip
    return Row(**(told | changes))  # type: ignore[arg-type]


def report(*rows: Row) -> Report:
    return Report("tiny", "here", 1e9, 1000, 10**9, list(rows))


# Times


def test_a_step_is_the_median_of_its_kinds_as_often_as_they_came() -> None:
    steps = Steps()
    for number in range(16):
        steps.add(0.009 if number == 15 else 0.001, "update" if number == 15 else "plain")
    assert steps.by_kind == {"plain": pytest.approx(1), "update": pytest.approx(9)}
    assert steps.ms == pytest.approx((15 * 1 + 9) / 16)
    assert steps.since(15).ms == pytest.approx(9)
    assert Steps([0.001, 0.002, 0.003], ["plain"] * 3).quartiles == (pytest.approx(1.5), pytest.approx(2.5))


def test_arms_take_turns_in_blocks() -> None:
    log: list[str] = []

    class Arm:
        def __init__(self, name: str) -> None:
            self.name, self.steps = name, Steps()

        def step(self) -> str:
            log.append(self.name)
            return "plain"

        def rewind(self, count: int) -> None:
            log.append(f"{self.name}-{count}")

    arms = [Arm("a"), Arm("b")]
    done: list[int] = []
    take_turns(arms, CPU, rounds=2, block=2, tell=done.append)
    assert log == ["a", "a", "a-2", "b", "b", "b-2"] * 2 and done == [1, 2]
    assert [len(arm.steps.seconds) for arm in arms] == [4, 4]


# Bytes


def test_the_bytes_of_a_published_model_are_those_of_the_literature() -> None:
    """Llama-3.1-8B in bfloat16: 15.01 GB of weights a step, 131,072 bytes a token, 2.88 times at batch 8, 32k to 2k."""
    model = random_model("llama-3.1-8b", device=torch.device("meta"))
    shape = shape_named("llama-3.1-8b", None)
    weights = weight_bytes(model)
    assert weights == pytest.approx(15.01e9, rel=1e-3) and token_bytes(shape) == 131_072
    dense = full_cache(load_policy("dense"), 32_768, shape, batch=8, steps=64)
    window = policy_case(load_policy("window"), "w", shape, context=32_768, budget=2048, batch=8, steps=64)
    assert slot_bytes(dense.plan) == 8 * 32_768 * 131_072
    assert slot_bytes(window.plan) == 8 * 2049 * 131_072
    assert (weights + slot_bytes(dense.plan)) / (weights + slot_bytes(window.plan)) == pytest.approx(2.88, abs=0.01)


def test_an_embedding_that_is_the_output_layer_too_is_read() -> None:
    model = random_model("smollm2-135m", layers=1, device=CPU)
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight and weight_bytes(model) == everything


def test_the_share_of_the_bandwidth() -> None:
    assert share(500, 0.001, 1e6) == pytest.approx(0.5)


def test_models_share_weights_and_may_be_shallow() -> None:
    model = random_model("smollm2-135m", layers=2, device=CPU)
    other, first = twin(model), shallow(model, 1)
    assert other is not model and other.lm_head.weight is model.lm_head.weight
    assert len(first.model.layers) == 1 == first.config.num_hidden_layers and len(model.model.layers) == 2
    assert first.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UsageError, match=r"--layers 31: smollm2-135m has 1..30 layers"):
        random_model("smollm2-135m", layers=31, device=CPU)


def test_what_fits_a_memory_is_counted_from_the_plan() -> None:
    shape = ModelGeometry("llama", 4, 4, 2, 8)
    case = full_cache(load_policy("dense"), 512, shape, batch=4, steps=16)
    bench = SimpleNamespace(model_bytes=10_000, weights=8_000, bandwidth=1e9)
    one = case.plan.bytes // 4
    memory = int((10_000 + 7.5 * one) / USABLE)
    found = capacity_of(bench, "dense", case, memory)  # type: ignore[arg-type]
    assert found.batch == 7 and found.sequence_bytes == one
    assert found.ideal_tokens_per_second == pytest.approx(7 * 1e9 / (8_000 + 7 * slot_bytes(case.plan) / 4))
    assert capacity_of(bench, "dense", case, 5_000).batch == 0  # type: ignore[arg-type]


# Counts


def test_memory_is_counted_to_the_byte() -> None:
    kept = []
    with measured(CPU) as usage:
        kept.append(torch.zeros(1000))
        passing = torch.zeros(5000)
        del passing
        kept.append(torch.zeros(250))
    assert usage.kept == 4 * 1250 and usage.peak == 4 * 6000 and usage.reserved is None
    assert gigabytes(2_500_000_000) == "2.5 GB" and gigabytes(1_250_000) == "1.2 MB"


def test_operators_count_once_and_views_do_not() -> None:
    left, right = torch.randn(4, 4), torch.randn(4, 4)
    assert launches(lambda: (left @ right).relu(), 3, CPU) == 2
    assert launches(lambda: left.t().view(4, 4)[1:], 1, CPU) == 0


# Reports


def test_ratios_are_compared_and_milliseconds_are_not() -> None:
    before = report(row(), row(label="raas")).to_dict()
    slower = row(ms=400.0, ratios={"dense": 1.44, "dense-at-budget": 0.90})
    found = compare(before, report(slower, row(label="tova")).to_dict(), 0.05)
    assert [(change.now, change.worse) for change in found.changes] == [(1.44, False), (0.90, True)]
    assert [change.change for change in found.changes] == [pytest.approx(-0.04), pytest.approx(0.90 / 0.97 - 1)]
    assert len(found.only_before) == 2 and all(name.startswith("raas, budget 1024") for name in found.only_before)
    assert len(found.only_now) == 2 and all(name.startswith("tova") for name in found.only_now)
    assert not found.notes and len(found.worse) == 1


def test_another_model_or_device_is_noted() -> None:
    now = report(row())
    now.device = "there"
    assert compare(report(row()).to_dict(), now.to_dict(), 0.05).notes == ("device: here then, there now",)


def test_equal_memory_and_growth_are_compared_too() -> None:
    told = report()
    told.capacities = [Capacity("h2o", 4096, 1024, 10, 7, 9.0, tokens_per_second=5.0, times_dense=3.5)]
    told.growths = [Growth("h2o", 1024, (100, 200), (1.0, 1.25), 1.25, 3)]
    assert [value for _, value in ratios(told.to_dict())] == [3.5, 0.8]
    told.capacities[0].tokens_per_second = None  # only planned: it says nothing of speed
    assert [value for _, value in ratios(told.to_dict())] == [0.8]


def test_a_report_is_saved_and_read_again(tmp_path: Path) -> None:
    save(tmp_path / "r.json", report(row()).to_dict())
    told = load(tmp_path / "r.json")
    assert told["rows"][0]["tokens_per_second"] == pytest.approx(500) and told["losses"]
    found = compare(told, report(row()).to_dict(), 0.0)
    assert not found.worse and {change.change for change in found.changes} == {0.0}


@pytest.mark.parametrize(("text", "said"), [("{}", "no report"), ("[1]", "no report"), ("{", "no JSON")])
def test_another_file_is_no_report(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        load(tmp_path / "r.json")
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "reference", "said"),
    [
        ({}, "dense-at-budget", "pure overhead"),
        ({"ideal": {"dense": 1.02}}, "dense", "nothing to win at this length"),
        ({"ratios": {"dense": 0.8, "dense-at-budget": 0.5}}, "dense", "its own work costs more"),
        ({}, "dense", r"bytes would give 2.00×$"),
        ({"roofline": 0.1}, "dense", "waits for launches and arithmetic"),
        ({"roofline": 0.1, "compiled": False}, "dense", "nothing is compiled"),
    ],
)
def test_a_loss_has_a_reason(changes: dict[str, object], reference: str, said: str) -> None:
    assert re.search(said, reason(row(**changes), reference))


def test_only_losses_of_policies_are_told() -> None:
    losing = row(ratios={"dense": 0.9, "hf-static": 1.2}, ideal={"dense": 1.0, "hf-static": 1.0})
    other = replace(losing, arm="hf-dynamic", label="hf-dynamic")
    assert [line.partition(";")[0] for line in report(losing, other).losses()] == [
        "h2o, budget 1,024 of 4,096, batch 2: 0.90× of dense"
    ]


def test_the_two_claims_are_two_tables() -> None:
    told = report(row(), row(arm="dense", label="dense", budget=None, ratios={}, ideal={}, prompt_ms=None))
    told.capacities = [Capacity("h2o", 4096, 1024, 10, 7, 9.0, times_dense=3.5)]
    found = list(tables(told))
    assert [table.title.partition(":")[0] for table in found] == [
        "Equal batch",
        "What a step is made of",
        "Equal memory",
    ]
    assert all(len(table.columns) == len(line) for table in found for line in table.rows)
    assert found[0].rows[0][-2:] == ["1.50 (2.00)", "0.97 (1.00)"] and found[1].rows[0][6] == "1.010"
    lines = list(remarks(told))
    assert lines[0] == "Where a policy loses:" and "--set heavy=512" in "\n".join(lines)
    assert any("random numbers fill the rest" in line for line in lines)
    assert all(one != two for one, two in pairwise(lines))
    json.dumps(told.to_dict())
