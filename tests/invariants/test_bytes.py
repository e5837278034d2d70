"""Freed memory is real: what a cache allocates is what its plan says, at every budget."""

from __future__ import annotations

import contextlib

import pytest

from kvpolicy.attention import Rotation
from kvpolicy.errors import KvpolicyError
from kvpolicy.plan import ModelGeometry, Plan, make_plan
from kvpolicy.runtime import PolicyCache
from tests.invariants.policies import grow, loaded, roomy, tight_sizes
from tests.policies.kit import FILES

GEOMETRY = ModelGeometry("random", layers=3, query_heads=4, kv_heads=2, head_dim=16)
LENGTHS = {"batch": 2, "prompt": (16, 64), "max_new_tokens": 160}


def plans(name: str) -> list[Plan]:
    """Three budgets: small ones as far as they take these lengths, and one with room for all."""
    found = []
    for factor in (1, 3, 9, 27):  # odd: so are the widths of smoothing, and stay it
        sizes = tuple((param, grow(value, factor)) for param, value in tight_sizes(name))
        with contextlib.suppress(KvpolicyError):
            found.append(make_plan(loaded(name, sizes), GEOMETRY, **LENGTHS))
    return [*found[:2], make_plan(roomy(name), GEOMETRY, **LENGTHS)]


@pytest.mark.parametrize("name", FILES)
def test_bytes_allocated_are_the_plans(name: str) -> None:
    budgets = plans(name)
    assert len(budgets) == 3
    for plan in budgets:
        cache = PolicyCache(plan, rotation=Rotation.none() if plan.policy.positions == "compact" else None)
        tensors = cache.clocks.tensors() + [tensor for part in cache.parts() for tensor in part.state.all_tensors()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        assert sum(storages.values()) == plan.bytes == cache.bytes
