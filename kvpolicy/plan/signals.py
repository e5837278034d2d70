"""What signals need from attention, and what a plan's scorers need together."""

from __future__ import annotations

from collections.abc import Iterator

from kvpolicy.language.signals import definition
from kvpolicy.plan.structure import LayerPlan, PoolPlan, ScorerPlan


def needs(signal: str) -> frozenset[str]:
    """What a signal reads, of ``kvpolicy.language.signals.NEEDS``."""
    return frozenset(definition(signal).needs)


def scoring_leaves(pool: PoolPlan) -> Iterator[ScorerPlan]:
    """The leaves that decide who leaves this pool: none where nothing ever does."""
    if pool.evicts:
        yield from pool.scorer.leaves()


def layer_needs(layer: LayerPlan) -> frozenset[str]:
    """Everything the scorers of a layer read."""
    found: set[str] = set()
    for pool in layer.pools:
        for leaf in scoring_leaves(pool):
            found |= needs(leaf.signal)
        if pool.read is not None:
            for leaf in pool.read.scorer.leaves():
                found |= needs(leaf.signal)
    return frozenset(found)


def reads_bounds(layer: LayerPlan, pool: PoolPlan) -> bool:
    """Whether page bounds must be kept for this pool: its own scorer reads them, or another's ranks the whole cache.

    Where ranks are positions, keys turn at every pass, and bounds are found when they are asked for.
    """
    if pool.page == 1 or layer.compact:
        return False
    for other in layer.pools:
        leaves = list(scoring_leaves(other)) + (list(other.read.scorer.leaves()) if other.read else [])
        for leaf in leaves:
            if "bounds" in needs(leaf.signal) and (other is pool or (leaf.over == "cache" and leaf.hit is not None)):
                return True
    return False
