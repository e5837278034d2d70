"""What each built-in signal needs from attention, and what a plan's scorers need together."""

from __future__ import annotations

from collections.abc import Iterator

from kvpolicy.plan.structure import LayerPlan, PoolPlan, ScorerPlan

# What a signal reads. "logits": scaled q.k of the queries that score, before any softmax (attention takes its softmax
# from them). "bounds": the channel-wise extremes of each page's keys. "drawn": a number drawn when the unit enters.
NEEDS: dict[str, frozenset[str]] = {
    "attention": frozenset({"logits"}),
    "attention-logit": frozenset({"logits"}),
    "page-bound": frozenset({"bounds"}),
    "recency": frozenset(),
    "random": frozenset({"drawn"}),
    "key-norm": frozenset({"keys"}),
    "value-norm": frozenset({"values"}),
    "key-anchor": frozenset({"keys"}),
    "key-similarity": frozenset({"keys"}),
}


def scoring_leaves(pool: PoolPlan) -> Iterator[ScorerPlan]:
    """The leaves that decide who leaves this pool: none where nothing ever does."""
    if pool.evicts:
        yield from pool.scorer.leaves()


def layer_needs(layer: LayerPlan) -> frozenset[str]:
    """Everything the scorers of a layer read."""
    needs: set[str] = set()
    for pool in layer.pools:
        for leaf in scoring_leaves(pool):
            needs |= NEEDS.get(leaf.signal, frozenset())
        if pool.read is not None:
            for leaf in pool.read.scorer.leaves():
                needs |= NEEDS.get(leaf.signal, frozenset())
    return frozenset(needs)


def reads_bounds(layer: LayerPlan, pool: PoolPlan) -> bool:
    """Whether page bounds must be kept for this pool: its own scorer reads them, or another's ranks the whole cache."""
    if pool.page == 1:
        return False
    for other in layer.pools:
        leaves = list(scoring_leaves(other)) + (list(other.read.scorer.leaves()) if other.read else [])
        for leaf in leaves:
            if leaf.signal == "page-bound" and (other is pool or (leaf.over == "cache" and leaf.hit is not None)):
                return True
    return False
