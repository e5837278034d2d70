"""positions: compact beside the oracle, with a rotation as models have it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from kvpolicy.attention import Rotation
from kvpolicy.language import loads_policy
from kvpolicy.plan import ModelGeometry, make_plan
from kvpolicy.runtime.compact import ranks
from kvpolicy.runtime.fused import Fusion
from kvpolicy.testing.beside import Beside, run_layer

GEOMETRY = ModelGeometry("random", layers=2, query_heads=4, kv_heads=2, head_dim=8)
WHOLE, PARTIAL = Rotation((1.0, 0.3, 0.1, 0.01)), Rotation((1.0, 0.2))

POOLS = {
    "streaming": "all: {admit: all, budget: 10, pinned: {first: 2}, window: 8}",
    "sums": "all: {admit: all, budget: 10, scorer: {signal: attention, queries: all, memory: sum}}",
    "a window of queries": "all: {admit: all, page: 3, budget: 'max(6, 30 - context)', "
    "scorer: {signal: attention, queries: {last: 5}, memory: {decay: 0.9}}}",
    "bounds": "all: {admit: all, page: 4, budget: 16, window: 3, "
    "scorer: {signal: page-bound, hit: {top: 50%}, memory: last-hit}}",
    "directions": "all: {admit: all, budget: 12, update: {every: 4}, scorer: {signal: key-anchor, weight: -1}}",
    "reading": "all: {admit: all, page: 2, budget: 24, read: {top: 8, scorer: {signal: page-bound}}}",
    "reading and scoring": "all: {admit: all, page: 2, budget: 14, read: {top: 8, scorer: {signal: page-bound}}, "
    "scorer: {signal: attention, queries: {last: 3}}}",
    "two pools": """
  prompt: {admit: prompt, budget: 9, scorer: {signal: attention, queries: {last: 4}}}
  generated: {admit: generated, page: 2, budget: 8, scorer: {signal: attention, hit: {top: 25%}, memory: last-hit}}""",
}


def beside(pools: str, rotation: Rotation, top: str = "", **how: object) -> Beside:
    policy = loads_policy(f"kvpolicy: 1\nname: test\npositions: compact\n{top}\npools:\n  {pools}")
    plan = make_plan(policy, GEOMETRY, batch=3, prompt=(0, 40), max_new_tokens=30, turns=3)
    return Beside(plan, rotation=rotation, **how)  # type: ignore[arg-type]


def say(runtime: Beside, *passes: list[int] | int) -> None:
    """Prompts by their tokens a row, and how many tokens to generate."""
    random = torch.Generator().manual_seed(0)

    def numbers(heads: int, columns: int) -> Tensor:
        return torch.randn(3, heads, columns, GEOMETRY.head_dim, generator=random)

    for rows in passes:
        if isinstance(rows, int):
            for _ in range(rows):
                runtime.feed([(2 * numbers(4, 1), numbers(2, 1), numbers(2, 1)) for _ in range(GEOMETRY.layers)])
        else:
            columns = max(rows)
            valid = torch.arange(columns) >= columns - torch.tensor(rows)[:, None]
            given = [
                (2 * numbers(4, columns), numbers(2, columns), numbers(2, columns)) for _ in range(GEOMETRY.layers)
            ]
            runtime.feed(given, valid, kind="prompt")


@pytest.mark.parametrize(("rotation", "top"), [(WHOLE, ""), (PARTIAL, "prompt_chunk: 4")])
@pytest.mark.parametrize("pools", POOLS.values(), ids=POOLS.keys())
def test_ragged_rows_and_turns(pools: str, rotation: Rotation, top: str) -> None:
    runtime = beside(pools, rotation, top)
    say(runtime, [23, 11, 0], 10, [2, 0, 8], 12)
    assert runtime.cache.stats()["evicted"] > 0
    assert len(runtime.agreement.near_ties) <= 2, runtime.agreement.summary()


def test_a_rank_is_not_a_position() -> None:
    """With keys turned from the wrong place the oracle disagrees: the comparison above can fail."""
    runtime = beside(POOLS["streaming"], WHOLE)
    for layer in runtime.cache.layers:
        layer.compact.frequencies = layer.compact.frequencies * 1.01
    with pytest.raises(AssertionError):
        say(runtime, [23, 11, 3], 10)


def test_vectors_may_carry_no_rotation() -> None:
    runtime = beside(POOLS["reading and scoring"], Rotation.none())
    say(runtime, [23, 11, 0], 10)


def test_compiled_steps_have_one_graph_a_kind() -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(run_layer, backend="aot_eager", fullgraph=True, dynamic=False)
    runtime = beside(POOLS["a window of queries"], WHOLE, generated=compiled)
    say(runtime, [13, 11, 3], 12)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert runtime.cache.stats()["evicted"] > 0


def test_ranks_count_what_comes_before() -> None:
    position = torch.tensor([[[7, -1, 2, 30, -1, 5]]], dtype=torch.int32)
    assert ranks(position, position)[position >= 0].tolist() == [2, 0, 3, 1]
    assert ranks(position, torch.tensor([[[-1, 6, 31]]])).tolist() == [[[0, 2, 4]]]


def test_no_kernel_does_a_whole_step_and_no_bounds_are_kept() -> None:
    plan = beside(POOLS["bounds"], WHOLE).plan
    fusion = Fusion.of(plan.layers[0], plan.geometry)
    assert isinstance(fusion, str) and fusion.startswith("positions are compact")
    assert not [buffer.name for buffer in plan.layers[0].buffers if buffer.name.endswith((".high", ".low"))]
