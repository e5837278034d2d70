"""Ada-KV over SnapKV's scores against algorithm 1 of arXiv:2407.11550 and its safeguard."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Head, Layer, top
from tests.policies.recipes.prompts import observed

BUDGET, WINDOW, KERNEL = 22, 6, 3


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 1.0])
def test_it_keeps_what_the_paper_keeps(safeguard: float) -> None:
    """All heads' scores in one list, its best counted by head, and each head's best so many."""

    def recipe(layer: Layer) -> Iterator[list[Head]]:
        mean, newest = BUDGET - WINDOW, set(range(layer.prompt - WINDOW, layer.prompt))
        scores = [observed(layer, head, WINDOW, KERNEL) for head in layer.heads]
        ranking = sorted(((float(score), head) for head in layer.heads for score in scores[head]), reverse=True)
        winners = [head for _, head in ranking[: mean * len(layer.heads)]]
        prompts = []
        for head in layer.heads:
            share = math.floor((1 - safeguard) * winners.count(head) + safeguard * mean + 0.5)
            prompts.append(top(share, scores[head]) | newest)
        if safeguard < 1:
            assert len(prompts[0]) != len(prompts[1]), "the heads win alike: nothing is tried"
        for now in (layer.prompt, *(newest + 1 for newest in layer.generated)):
            yield [Head(prompt | set(range(layer.prompt, now))) for prompt in prompts]

    params = {"budget": BUDGET, "window": WINDOW, "kernel": KERNEL, "safeguard": str(safeguard)}
    check(load_policy("ada-kv", set=params), recipe)
