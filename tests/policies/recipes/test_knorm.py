"""The key norm against section 4 of arXiv:2406.11430, with a budget in tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Head, Layer, top

BUDGET = 24


def knorm(layer: Layer) -> Iterator[list[Head]]:
    """The shortest keys of all that are there."""
    norms = np.linalg.norm(layer.keys, axis=-1)
    caches = [set(range(layer.prompt)) for _ in layer.heads]
    for newest in (layer.prompt - 1, *layer.generated):
        caches = [top(BUDGET, {at: -norms[head, at] for at in caches[head] | {newest}}) for head in layer.heads]
        yield [Head(cache) for cache in caches]


def test_knorm_keeps_the_shortest_keys() -> None:
    check(load_policy("knorm", set={"budget": BUDGET}), knorm)
