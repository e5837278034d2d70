"""What the torch runtime cannot do yet, by name. The language and the oracle know all of it."""

from __future__ import annotations

from collections.abc import Iterator

from kvpolicy.errors import UsageError
from kvpolicy.language.signals import SIGNALS, definition, origin
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


def _layer(layer: LayerPlan) -> Iterator[str]:
    for pool in layer.every_pool:
        if layer.groups and pool.scope != "kv-head":
            yield f"pool {pool.name}: evict scope {pool.scope} beside overrides for single heads"
        yield from (f"pool {pool.name}: {reason}" for reason in _pool(pool))


def _pool(pool: PoolPlan) -> Iterator[str]:
    if not pool.admits:
        yield "a pool fed by another"
    if pool.scope == "across-heads":
        yield "evict scope across-heads"
    if pool.to is not None:
        yield "evict {to: …}"
    if pool.store is not None:
        yield "store bits"
    if pool.evicts:
        for leaf in pool.scorer.leaves():
            yield from _leaf(leaf)


def _leaf(leaf: ScorerPlan) -> Iterator[str]:
    if leaf.signal not in SIGNALS and definition(leaf.signal).torch is None:
        yield f"signal {leaf.signal}, which {origin(leaf.signal)} gives no torch recipe"
