"""Keyformer against section 3 of arXiv:2403.09054: accumulated noisy attention, at a temperature that rises."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Array, Head, Layer, softmax, top

BUDGET, RECENT, START, GROWTH, SEED = 24, 8, 1.0, 0.01, 5


def splitmix(state: int) -> int:
    """splitmix64's finaliser."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def gumbel(layer: int, head: int, position: int) -> float:
    """Noise by inversion: -log(-log(1 - u)), where u are 24 hashed bits, made odd so that it is never 0 or 1."""
    state = 0
    for number in (SEED, layer, head, position):
        state = splitmix(state ^ ((number + 0x9E3779B97F4A7C15) % 2**64))
    return -math.log(-math.log(1 - ((state >> 40) | 1) / 2**24))


def noisy(layer: Layer, head: int, queries: list[int], tokens: list[int], t: int) -> Array:
    """[G, queries, tokens]: softmax of (logit + noise) / temperature."""
    noise = np.array([gumbel(layer.number, head, at) for at in tokens])
    return softmax((layer.logits(head, queries, tokens) + noise) / (START + GROWTH * t))


def keyformer(layer: Layer) -> Iterator[list[Head]]:
    caches = [list(range(layer.prompt)) for _ in layer.heads]
    sums: list[dict[int, float]] = [{} for _ in layer.heads]
    for t, newest in enumerate((layer.prompt - 1, *layer.generated)):
        for head, cache in enumerate(caches):
            if t:
                cache.append(newest)
            queries = [newest] if t else list(range(layer.prompt))
            paid = noisy(layer, head, queries, cache, t).sum(axis=1).mean(axis=0)  # over queries, then the group
            sums[head] = {at: sums[head].get(at, 0.0) + p for at, p in zip(cache, paid, strict=True)}
            older = {at: sums[head][at] for at in cache if at <= newest - RECENT}
            caches[head] = sorted(top(BUDGET - RECENT, older) | {at for at in cache if at > newest - RECENT})
        yield [Head(set(cache)) for cache in caches]


def test_keyformer_keeps_what_the_paper_keeps() -> None:
    check(load_policy("keyformer", set={"budget": BUDGET, "recent": RECENT, "seed": SEED}), keyformer)
