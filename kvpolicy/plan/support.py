"""What the torch runtime cannot do yet, by name. The language and the oracle know all of it."""

from __future__ import annotations

from collections.abc import Iterator

from kvpolicy.errors import UsageError
from kvpolicy.language.signals import SIGNALS, definition, origin
from kvpolicy.plan.signals import needs, reads_bounds, scoring_leaves
from kvpolicy.plan.structure import LayerPlan, Plan, PoolPlan, ScorerPlan


def check_supported(plan: Plan) -> None:
    """Raise a UsageError that names everything in the policy that the runtime cannot run."""
    missing = list(dict.fromkeys(unsupported(plan)))
    if missing:
        raise UsageError(
            f"{plan.policy.name} says what the runtime cannot do yet: {'; '.join(missing)} "
            "(the oracle can: kvpolicy.oracle)"
        )


def unsupported(plan: Plan) -> Iterator[str]:
    """Every reason why the runtime would refuse this plan, in reading order."""
    for layer in plan.layers:
        yield from _layer(layer)
        if plan.geometry.softcap is not None:
            yield from _capped(layer)
        if plan.prompt_chunk is not None:
            yield from (f"pool {pool.name}: store beside prompt_chunk" for pool in layer.every_pool if pool.stages)


def _layer(layer: LayerPlan) -> Iterator[str]:
    for pool in layer.every_pool:
        if layer.groups and pool.scope != "kv-head":
            yield f"pool {pool.name}: evict scope {pool.scope} beside overrides for single heads"
        if layer.compact and (pool.to is not None or pool.store is not None or pool.shared):
            yield f"pool {pool.name}: units that move, are stored in few bits or shared by heads, at compact positions"
        yield from (f"pool {pool.name}: {reason}" for reason in _pool(pool))
    yield from _numbers_that_change(layer)
    if layer.shared:
        names = ", ".join(pool.name for pool in layer.shared)
        for pool in layer.pools:
            yield from (f"pool {pool.name}: {reason} beside {names}, whose heads share" for reason in _beside(pool))


def _capped(layer: LayerPlan) -> Iterator[str]:
    """A page's bound is capped query by query; the runtime sums the bounds of many queries before that."""
    for pool in layer.every_pool:
        for leaf in scoring_leaves(pool):
            if "bounds" in needs(leaf.signal) and leaf.queries != "current" and pool.page > 1:
                yield f"pool {pool.name}: {leaf.signal} of several queries, where the model caps its logits"


def _numbers_that_change(layer: LayerPlan) -> Iterator[str]:
    """A unit that moves to few bits is ranked, in that very pass, by what it was; slots hold what it has become."""
    for pool in layer.every_pool:
        if pool.store is None:
            continue
        if reads_bounds(layer, pool) and pool.store.keys == "token":
            yield f"pool {pool.name}: bounds of pages whose keys are stored by token"
        if not pool.fed:
            continue
        for other in layer.every_pool:
            for leaf in scoring_leaves(other) if other.cadence > 0 else ():
                if isinstance(leaf.queries, int) or needs(leaf.signal) & {"keys", "values"}:
                    yield f"pool {other.name}: {leaf.signal} by keys or earlier queries, beside the stored {pool.name}"


def _pool(pool: PoolPlan) -> Iterator[str]:
    if pool.scope == "across-heads" and pool.evicts and not pool.shared:
        yield _across_heads(pool)
    if pool.evicts:
        for leaf in pool.scorer.leaves():
            yield from _leaf(leaf)


def _across_heads(pool: PoolPlan) -> str:
    """Why heads cannot share this pool's slots."""
    if pool.cadence > 0 or "generated" in pool.admits:
        return "evict scope across-heads while generating"
    return "evict scope across-heads in a pool that selects, stores in bits, or is linked to another"


def _beside(pool: PoolPlan) -> Iterator[str]:
    """What a pool may not ask in generated passes of a layer in which heads share slots: what needs the shared units'
    keys head by head, which would be a copy of them."""
    leaves = list(scoring_leaves(pool)) if pool.cadence > 0 else []
    for leaf in (*leaves, *(pool.read.scorer.leaves() if pool.read is not None else ())):
        if (
            leaf.hit is not None
            and leaf.hit[0] == "top"
            and leaf.over == "cache"
            and needs(leaf.signal) - {"logits", "drawn"}
        ):
            yield f"hits of {leaf.signal} over the cache"


def _leaf(leaf: ScorerPlan) -> Iterator[str]:
    if leaf.signal not in SIGNALS and definition(leaf.signal).torch is None:
        yield f"signal {leaf.signal}, which {origin(leaf.signal)} gives no torch recipe"
