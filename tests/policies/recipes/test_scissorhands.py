"""Scissorhands against algorithms 1 and 2 of arXiv:2305.17118, batches by the clock."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Head, Layer, top

BUDGET, HISTORY, RECENT, DROP = 24, 12, 4, 8


def scissorhands(layer: Layer) -> Iterator[list[Head]]:
    caches = [list(range(layer.prompt)) for _ in layer.heads]
    for t, newest in enumerate((layer.prompt - 1, *layer.generated)):
        for head, cache in enumerate(caches):
            if t:
                cache.append(newest)
            if t % DROP == 0:
                history = list(range(newest - HISTORY + 1, newest + 1))
                paid = layer.attention(head, history, cache)
                seen = (np.array(cache) <= np.array(history)[:, None]).sum(axis=1, keepdims=True)
                important = (paid >= 1 / seen).mean(axis=(0, 1))
                older = {at: n for at, n in zip(cache, important, strict=True) if at <= newest - RECENT}
                stay = top(BUDGET - DROP - RECENT, older)
                caches[head] = sorted(stay | {at for at in cache if at > newest - RECENT})
        yield [Head(set(cache)) for cache in caches]


def test_scissorhands_keeps_what_the_paper_keeps() -> None:
    sizes = {"budget": BUDGET, "history": HISTORY, "recent": RECENT, "drop": DROP}
    check(load_policy("scissorhands", set=sizes), scissorhands)
