"""LazyEviction against arXiv:2506.15969: the last activation and the longest gap between two decide."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Head, Layer, top

BUDGET, WINDOW, BAR = 32, 8, 0.04


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def lazy_eviction(layer: Layer) -> Iterator[list[Head]]:
    caches = [list(range(layer.prompt)) for _ in layer.heads]
    last: list[dict[int, int]] = [{} for _ in layer.heads]  # the time of the last activation, or of entry
    gap: list[dict[int, int]] = [{} for _ in layer.heads]  # the longest between two
    for t, newest in enumerate((layer.prompt - 1, *layer.generated)):
        for head, cache in enumerate(caches):
            if t:
                cache.append(newest)
            for at, paid in zip(cache, layer.attention(head, newest, cache).max(axis=0), strict=True):
                before = last[head].setdefault(at, t)
                if paid >= BAR:
                    last[head][at], gap[head][at] = t, max(gap[head].get(at, 0), t - before)
            if t % WINDOW == 0:
                score = {}
                for at in cache[:-WINDOW]:
                    longest = gap[head].get(at, 0)
                    overdue = 2 * sigmoid(-(t - last[head][at]) / max(longest, 1))
                    score[at] = overdue + (2 * sigmoid(-longest) if longest else 0.0)
                caches[head] = sorted(top(BUDGET - WINDOW, score)) + cache[-WINDOW:]
        yield [Head(set(cache)) for cache in caches]


def test_lazy_eviction_keeps_what_the_paper_keeps() -> None:
    check(load_policy("lazy-eviction", set={"budget": BUDGET, "window": WINDOW, "bar": BAR}), lazy_eviction)
