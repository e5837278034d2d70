"""`scope: layer` keeps one set for all heads, so all that decide together must have the same pool to choose from."""

from __future__ import annotations

import pytest

from kvpolicy.errors import PolicyError
from kvpolicy.language import loads_policy
from kvpolicy.plan import ModelGeometry, make_plan

GEOMETRY = ModelGeometry("llama", layers=2, query_heads=4, kv_heads=2, head_dim=8)
POLICY = """
kvpolicy: 1
name: x
pools: {all: {admit: all, budget: 16, scorer: {signal: attention}, evict: {scope: layer}}}
overrides: [{heads: [[0, 0]], %s}]
"""


def test_heads_with_other_budgets_are_refused() -> None:
    with pytest.raises(PolicyError, match=r":4:83: `all` keeps one set for all heads, but an override gives"):
        make_plan(loads_policy(POLICY % "pools: {all: {budget: 8}}"), GEOMETRY, prompt=20, max_new_tokens=20)


def test_a_head_that_keeps_everything_decides_nothing() -> None:
    plan = make_plan(loads_policy(POLICY % "dense: true"), GEOMETRY, prompt=20, max_new_tokens=20)
    assert [len(layer.groups) for layer in plan.layers] == [2, 0]
