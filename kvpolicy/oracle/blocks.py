"""LagKV's signal: each block of the text is scored against the block after it (arXiv:2504.04704, section 3).

A channel is scaled by its least and greatest number in the next block; a token's score is how far its scaled channels
spread (their standard deviation, n - 1), softmax over its block, keys and values averaged; and of that the rank within
the block counts. Blocks go by position, so they stay what they are however many of their tokens are left.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvpolicy.oracle.text import Array, View
from kvpolicy.plan import ScorerPlan


def lag(view: View, leaf: ScorerPlan, over: Array, ranked: Array) -> Array:
    """[tokens]: minus the share of a block's positions that hold a better token; 1 where no whole block comes after."""
    size = int(dict(leaf.args)["lag"])
    scores = np.ones(len(view.tokens))
    for columns, spread in blocks(view, leaf, ranked):
        worst_first = np.lexsort([columns, spread])  # of equals the newer is the better
        scores[columns[worst_first]] = -np.arange(len(columns))[::-1] / size
    return scores


def lag_margins(view: View, leaf: ScorerPlan, over: Array, ranked: Array) -> Array:
    """[tokens]: how close another token of the block comes, 1 being a tie."""
    margins = np.full(len(view.tokens), np.inf)
    for columns, spread in blocks(view, leaf, ranked):
        order = np.argsort(spread)
        ratios = np.append(spread[order][1:] / spread[order][:-1], np.inf)
        margins[columns[order]] = np.minimum(ratios, np.append(np.inf, ratios[:-1]))
    return margins


def blocks(view: View, leaf: ScorerPlan, ranked: Array) -> Iterator[tuple[Array, Array]]:
    """(Where a block's tokens lie in ``view.tokens``, their scores) of each block that a whole one comes after."""
    args = dict(leaf.args)
    size, after = int(args["lag"]), int(args["after"])
    held = np.flatnonzero(ranked & (view.tokens >= after))
    number = (view.tokens[held] - after) // size
    for block in np.unique(number):
        here, following = held[number == block], held[number == block + 1]
        if len(following) and view.tokens[held[-1]] >= after + (block + 2) * size - 1:
            parts = [_weights(vectors[here], vectors[following]) for vectors in (view.keys(), view.values())]
            yield here, (parts[0] + parts[1]) / 2


def _weights(vectors: Array, following: Array) -> Array:
    """Softmax over a block's vectors [n, D] of how they spread when scaled by the next block's ranges."""
    low, high = following.min(axis=0), following.max(axis=0)
    scaled = (vectors - low) / np.where(high > low, high - low, 1.0)
    spread = np.sqrt(((scaled - scaled.mean(axis=1, keepdims=True)) ** 2).sum(axis=1) / max(1, vectors.shape[1] - 1))
    weights = np.exp(spread - spread.max())
    return weights / weights.sum()
