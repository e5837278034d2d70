"""TOVA against section 4 of arXiv:2401.06104."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Head, Layer, top

BUDGET = 24


def tova(layer: Layer) -> Iterator[list[Head]]:
    """The tokens to which the last query attends most, on average over all heads of the layer."""
    cache = list(range(layer.prompt))
    for newest in (layer.prompt - 1, *layer.generated):
        if newest >= layer.prompt:
            cache.append(newest)
        attention = np.concatenate([layer.attention(head, newest, cache) for head in layer.heads]).mean(axis=0)
        cache = sorted(top(BUDGET, attention, cache))
        yield [Head(set(cache))] * len(layer.heads)


def test_tova_keeps_what_the_paper_keeps() -> None:
    check(load_policy("tova", set={"budget": BUDGET}), tova)
