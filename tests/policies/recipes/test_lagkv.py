"""LagKV against section 3 of arXiv:2504.04704: each block is scored against the next, and cut once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check, text
from tests.policies.recipes.plain import Array, Head, Layer, softmax, top

SINKS, LAG, SHARE = 4, 8, 0.5


def score(block: Array, following: Array) -> Array:
    """Channels scaled by the range they have in the next block; how they spread in a token; softmax over the block."""
    low, high = following.min(axis=0), following.max(axis=0)
    return softmax(((block - low) / (high - low)).std(axis=1, ddof=1))


def lagkv(layer: Layer) -> Iterator[list[Head]]:
    done: list[set[int]] = [set(range(SINKS)) for _ in layer.heads]  # sinks and blocks that have been cut
    begin = SINKS  # of the first block that has not
    for newest in (layer.prompt - 1, *layer.generated):
        while newest + 1 >= begin + 2 * LAG:
            here, following = slice(begin, begin + LAG), slice(begin + LAG, begin + 2 * LAG)
            for head in layer.heads:
                scores = sum(score(of[head, here], of[head, following]) for of in (layer.keys, layer.values))
                done[head] |= top(int(SHARE * LAG), scores, range(begin, begin + LAG))
            begin += LAG
        yield [Head(cut | set(range(begin, newest + 1))) for cut in done]


@pytest.mark.parametrize("prompt", [40, 10])
def test_lagkv_keeps_what_the_paper_keeps(prompt: int) -> None:
    policy = load_policy("lagkv", set={"sinks": SINKS, "lag": LAG, "ratio": "50%"})
    check(policy, lagkv, text(prompt=prompt))


def test_the_mean_and_the_sum_of_both_scores_rank_alike() -> None:
    random = np.random.default_rng(0)
    both = random.random((2, 50))
    assert (np.argsort(both.sum(axis=0)) == np.argsort(both.mean(axis=0))).all()
