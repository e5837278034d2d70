"""RPC against arXiv:2505.13866: the path is cut to a share of its length, one set for a layer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Head, Layer, smoothed, top

EVERY, RATIO, WINDOW, KERNEL = 16, 4, 8, 3


def rpc(layer: Layer) -> Iterator[list[Head]]:
    path: list[int] = []
    for t, newest in enumerate((layer.prompt - 1, *layer.generated)):
        path += [newest] if t else []
        if t and t % EVERY == 0:
            older, window = path[:-WINDOW], path[-WINDOW:]
            paid = np.concatenate([layer.attention(head, window, older) for head in layer.heads])
            score = smoothed("mean", KERNEL, paid.sum(axis=1).mean(axis=0))
            path = sorted(top(t // RATIO, score, older)) + window
        yield [Head(set(range(layer.prompt)) | set(path))] * len(layer.heads)


def test_rpc_keeps_what_the_paper_keeps() -> None:
    sizes = {"every": EVERY, "ratio": RATIO, "window": WINDOW, "kernel": KERNEL}
    check(load_policy("rpc", set=sizes), rpc)
