"""R-KV against section 3 of arXiv:2505.24133: importance of the newest queries against redundancy of keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Array, Head, Layer, smoothed, softmax, top

BUDGET, BUFFER, WINDOW, KERNEL, MIX = 24, 8, 4, 3, 0.1


def redundancy(keys: Array) -> Array:
    """Mean cosine with all others; in each row the newest copy (a cosine above 0.5) does not count."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    cosines = unit @ unit.T - np.eye(len(keys)) * (unit * unit).sum(axis=1)
    for row in cosines:
        copies = [at for at, cosine in enumerate(row) if cosine > 0.5]
        if copies:
            row[copies[-1]] = 0.0
    return cosines.mean(axis=0)


def importance(layer: Layer, head: int, window: Sequence[int], older: Sequence[int]) -> Array:
    """Logits maxed over the group, softmax over the older tokens, mean over the window, max over neighbours."""
    logits = layer.logits(head, window, older).max(axis=0)
    return smoothed("max", KERNEL, softmax(logits).mean(axis=0))


def r_kv(layer: Layer) -> Iterator[list[Head]]:
    caches = [list(range(layer.prompt)) for _ in layer.heads]
    for t, newest in enumerate((layer.prompt - 1, *layer.generated)):
        for head, cache in enumerate(caches):
            if t:
                cache.append(newest)
            if t % BUFFER == 0:
                older, window = cache[:-WINDOW], cache[-WINDOW:]
                alike = softmax(redundancy(layer.keys[head][cache])[:-WINDOW])
                score = MIX * importance(layer, head, window, older) - (1 - MIX) * alike
                caches[head] = sorted(top(BUDGET - WINDOW, score, older)) + window
        yield [Head(set(cache)) for cache in caches]


def test_r_kv_keeps_what_the_paper_keeps() -> None:
    sizes = {"budget": BUDGET, "buffer": BUFFER, "window": WINDOW, "kernel": KERNEL}
    check(load_policy("r-kv", set=sizes), r_kv)
