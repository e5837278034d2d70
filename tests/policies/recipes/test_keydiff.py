"""KeyDiff against section 3 of arXiv:2504.15364."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Array, Head, Layer, top

BUDGET, BLOCK = 24, 16


def unit(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def least_like_the_anchor(layer: Layer, head: int, cache: Sequence[int]) -> list[int]:
    """The anchor is the mean direction of the keys in the cache; what is most similar to it goes."""
    keys = unit(layer.keys[head][list(cache)])
    return sorted(top(BUDGET, -keys @ unit(keys.mean(axis=0)), cache))


def keydiff(layer: Layer) -> Iterator[list[Head]]:
    caches: list[list[int]] = [[] for _ in layer.heads]
    for start in range(0, layer.prompt, BLOCK):
        block = list(range(start, min(start + BLOCK, layer.prompt)))
        caches = [least_like_the_anchor(layer, head, [*caches[head], *block]) for head in layer.heads]
    yield [Head(set(cache)) for cache in caches]
    for newest in layer.generated:
        caches = [least_like_the_anchor(layer, head, [*caches[head], newest]) for head in layer.heads]
        yield [Head(set(cache)) for cache in caches]


def test_keydiff_keeps_what_the_paper_keeps() -> None:
    check(load_policy("keydiff", set={"budget": BUDGET, "block": BLOCK}), keydiff)
