"""A compiled step: one graph per kind for all layers, the same tokens as the oracle, and no copy of the cache."""

import re

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from kvpolicy.attention import Formula
from kvpolicy.language import load_policy
from kvpolicy.plan import ModelGeometry, make_plan
from kvpolicy.runtime import PolicyCache
from kvpolicy.testing.beside import Beside, run_layer

GEOMETRY = ModelGeometry("random", layers=3, query_heads=4, kv_heads=2, head_dim=8)
POLICIES = {
    "raas": ({"budget": 48, "page_size": 4}, 2),
    "scope-slide": ({"alpha": 14, "alpha2": 3, "beta1": 9, "beta2": 7}, 1),
    "scope-discontinuous": ({"alpha": 14, "alpha2": 3, "beta1": 9, "beta2": 7, "horizon": 60}, 2),
    "h2o": ({"heavy": 10, "recent": 6}, 1),
    "random-unpinned": ({"budget": 18}, 1),
}


def numbers(rows: int, columns: int, generator: torch.Generator) -> list[tuple[torch.Tensor, ...]]:
    def one(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, columns, GEOMETRY.head_dim, generator=generator)

    return [(2 * one(4), one(2), one(2)) for _ in range(GEOMETRY.layers)]


@pytest.mark.parametrize("name", POLICIES)
def test_compiled_steps_keep_what_the_oracle_keeps_in_one_graph_per_kind(name: str) -> None:
    params, kinds = POLICIES[name]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(run_layer, fullgraph=True, dynamic=False)
    plan = make_plan(load_policy(name, set=params), GEOMETRY, batch=2, prompt=(9, 24), max_new_tokens=60)
    beside, generator = Beside(plan, generated=compiled), torch.Generator().manual_seed(0)
    valid = torch.arange(24) >= 24 - torch.tensor([[24], [9]])
    beside.feed(numbers(2, 24, generator), valid)
    for _ in range(60):
        beside.feed(numbers(2, 1, generator))
    assert counters["stats"]["unique_graphs"] == kinds
    assert not counters["graph_break"]
    assert beside.cache.stats()["evicted"] > 0


@pytest.mark.parametrize("name", ["scope-slide", "raas"])
def test_the_generated_code_writes_slots_in_place(name: str) -> None:
    """Trap: scatter_ into keys makes Inductor copy the whole cache each step; index assignment does not."""
    torch._dynamo.reset()
    plan = make_plan(load_policy(name, set=POLICIES[name][0]), GEOMETRY, batch=1, prompt=24, max_new_tokens=60)
    cache, generator = PolicyCache(plan), torch.Generator().manual_seed(0)
    cache.begin(24)
    with torch.no_grad():
        for layer, given in zip(cache.layers, numbers(1, 24, generator), strict=True):
            run_layer(layer, *given, Formula(0.35))
        cache.finish()
        while cache.begin(1) != "update":
            for layer, given in zip(cache.layers, numbers(1, 1, generator), strict=True):
                run_layer(layer, *given, Formula(0.35))
            cache.finish()
        compiled = torch.compile(run_layer, fullgraph=True, dynamic=False)
        _, sources = run_and_get_code(compiled, cache.layers[0], *numbers(1, 1, generator)[0], Formula(0.35))
    slots = plan.layers[0].slots
    allocated = re.findall(r"empty_strided\w*\(\(([^)]*)\)", "\n".join(sources))
    shapes = [tuple(int(size) for size in text.split(",") if size.strip()) for text in allocated]
    assert shapes, "the code that Inductor wrote has no allocation that this test can read"
    whole = slots * GEOMETRY.head_dim * GEOMETRY.kv_heads
    assert all(torch.Size(shape).numel() < whole for shape in shapes), shapes
