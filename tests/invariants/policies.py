"""Every shipped policy at three sizes, and which of them the expensive tests take. No list here is kept by hand.

A policy is small as its own YAML tests make it small; roomy and smallest sizes are found by asking plans. Tests whose
cost is a second or so a policy run on ``COVER`` alone, or on ``SHAPES`` where how tokens are scored cannot matter, and
on the others in the slow run: see ``thorough``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import cache
from itertools import product
from typing import Any

import pytest

from kvpolicy.errors import KvpolicyError
from kvpolicy.language import Policy, Range, load_policy, shipped_policies
from kvpolicy.plan import LayerPlan, ModelGeometry, Plan, PoolPlan, ScorerPlan, make_plan, unsupported
from kvpolicy.plan.timeline import timeline

GEOMETRY = ModelGeometry("random", layers=3, query_heads=4, kv_heads=2, head_dim=8)
Sizes = dict[str, Any]


def plan_of(policy: Policy, prompt: int | tuple[int, int], steps: int, geometry: ModelGeometry = GEOMETRY) -> Plan:
    return make_plan(policy, geometry, prompt=prompt, max_new_tokens=steps)


@cache
def loaded(name: str, sizes: tuple[tuple[str, Any], ...] = ()) -> Policy:
    """The policy with params set; reading YAML is what takes the time here."""
    return load_policy(name, set=dict(sizes))


def attempt(name: str, sizes: Sizes, prompt: int | tuple[int, int], steps: int) -> Plan | None:
    """The plan at these sizes; None where they are refused."""
    try:
        return plan_of(loaded(name, tuple(sizes.items())), prompt, steps)
    except KvpolicyError:
        return None


def pools_of(plan: Plan) -> Iterator[tuple[LayerPlan, PoolPlan]]:
    """Every pool of every layer, also those of single KV heads."""
    for layer in plan.layers:
        for pools in {layer.pools, *(layer.heads or ())}:
            yield from ((layer, pool) for pool in pools)


def evicts(plan: Plan) -> bool:
    """Whether some token leaves its pool in a text as long as the plan allows."""
    return any(line.evicted for layer in plan.layers for line in timeline(plan, layer)) or any(
        layer.heads is not None and not plan.never_fires for layer in plan.layers
    )


def drops(plan: Plan) -> bool:
    """Whether some token leaves for good in a text as long as the plan allows, and does not only move on."""
    moving = {pool.name for _, pool in pools_of(plan) if pool.to is not None}
    lines = [line for layer in plan.layers for line in timeline(plan, layer)]
    return evicts(plan) and (not moving or any(line.evicted for line in lines if line.name not in moving))


def updates(plan: Plan) -> bool:
    """Whether a generated step may be one with an update."""
    return any(pool.evicts and pool.cadence for _, pool in pools_of(plan))


def keeps_and_reads_everything(plan: Plan) -> bool:
    """Whether this is the full cache: nothing leaves a pool, and no step passes a token by."""
    ranges = {"t": Range(Fraction(0), Fraction(plan.max_new_tokens))}
    unread = (pool.read is not None and pool.read.top.bound(ranges).low < pool.capacity for _, pool in pools_of(plan))
    return (plan.never_fires or not evicts(plan)) and not any(unread)


def numbers(name: str) -> Sizes:
    """Params that are whole numbers, at their defaults."""
    found = {param: value.default.constant for param, value in loaded(name).params.items()}
    return {param: int(value) for param, value in found.items() if value is not None and value.denominator == 1}


# Sizes -----------------------------------------------------------------------------------------------------------


@cache
def tight_sizes(name: str) -> tuple[tuple[str, Any], ...]:
    """The first sizes of the policy's own tests, or these times a factor, with which a text of 24 + 40 tokens loses,
    or leaves unread, some of them.

    Prompts of 2 to 38 tokens must fit.
    """
    told = [test.set for test in loaded(name).tests]
    sets = [given for at, given in enumerate(told) if given and given not in told[:at]] or [{}]
    for factor, sizes in product((1, 1.5, 2, 2.5, 3, 4), sets):
        grown = {param: grow(value, factor) for param, value in sizes.items()}
        fits = all(attempt(name, grown, prompt, 90) is not None for prompt in (1, 2, (2, 38), 38))
        if fits and not keeps_and_reads_everything(plan_of(loaded(name, tuple(grown.items())), 24, 40)):
            return tuple(grown.items())
    return ()


def tight_plan(name: str, geometry: ModelGeometry, **lengths: Any) -> Plan:
    """The plan of the policy at its tight sizes, or at such multiples of them as take these lengths."""
    for factor in (1, 1.5, 2, 3):
        grown = tuple((param, grow(value, factor)) for param, value in tight_sizes(name))
        try:
            return make_plan(loaded(name, grown), geometry, **lengths)
        except KvpolicyError as refusal:
            reason = refusal
    raise reason


def grow(value: Any, factor: float) -> Any:
    whole = str(value)
    return int(int(whole) * factor) if whole.isdigit() else value


def tight(name: str) -> Policy:
    """The policy at a size that must evict, where it ever does."""
    return loaded(name, tight_sizes(name))


@cache
def roomy(name: str) -> Policy:
    """The policy at a size that keeps, and reads, some two hundred tokens: its defaults where they do."""
    policy = loaded(name)
    for factor in (1, 4, 16, 64):
        grown: Sizes = {param: value * factor for param, value in numbers(name).items()} if factor > 1 else {}
        for param, value in policy.params.items():  # shares of the prompt become numbers
            if factor > 1 and value.default.constant is None:
                grown[param] = 16 * factor
        plan = attempt(name, grown, (1, 64), 128)
        if plan is not None and keeps_and_reads_everything(plan):
            return loaded(name, tuple(grown.items()))
    raise AssertionError(f"no scaling of the params of {name} gives it room for 192 tokens")


@cache
def smallest(name: str) -> Policy:
    """The policy with every whole number as small as a prompt of one token and 20 steps allow."""
    sizes = numbers(name)
    for param in 2 * list(loaded(name).params):  # twice: what one leaves may let another shrink further
        for value in range(min(4, sizes.get(param, 4))):
            # Also of a long answer: `apply` knows no lengths yet, and refuses what no answer could fit.
            if all(attempt(name, sizes | {param: value}, 1, steps) is not None for steps in (20, 4096)):
                sizes[param] = value
                break
    return loaded(name, tuple(sizes.items()))


# Which policies --------------------------------------------------------------------------------------------------

ALL = list(shipped_policies())
NAMES = [name for name in ALL if not list(unsupported(plan_of(tight(name), (5, 24), 40)))]
"""Those that the runtime runs; tests/policies/test_shipped.py wants all of them to be."""
EVICTING = [name for name in NAMES if drops(plan_of(tight(name), 24, 40))]
UPDATING = [name for name in NAMES if updates(plan_of(tight(name), 24, 40))]
"""Those that drop tokens while they generate, and not at the end of a prompt alone."""


def features(plan: Plan) -> frozenset[str]:
    """What a plan asks of the runtime, as words: two plans with the same words take the same paths."""
    found = {f"positions {plan.policy.positions}", f"chunked {plan.policy.prompt_chunk is not None}"}
    found.add(f"layers {'differ' if len({shape(layer) for layer in plan.layers}) > 1 else 'alike'}")
    found.add(f"total {plan.policy.total is not None}")
    for layer in plan.layers:
        found |= {f"dense {layer.dense}", f"by head {layer.heads is not None}", f"pools {len(layer.pools)}"}
    for _, pool in pools_of(plan):
        found |= {f"pool: {word}" for word in pool_features(pool)}
    return frozenset(found)


def shape(layer: LayerPlan) -> object:
    return layer.dense, tuple((pool.capacity, pool.page, pool.cadence) for pool in layer.pools)


def pool_features(pool: PoolPlan) -> Iterator[str]:
    yield f"admits {', '.join(sorted(pool.admits))}, evicts {pool.evicts}, paged {pool.page > 1}"
    yield f"safe {[pool.first is not None, pool.window is not None, pool.pin_special, pool.pin_survivors]}"
    yield f"fed {not pool.admits}, feeds {pool.to is not None}"
    if pool.store is not None:
        yield f"store {pool.store.bits} {pool.store.keys} {pool.store.values}"
    if pool.read is not None:
        yield "read"
        yield from (f"read {word}" for word in scorer_features(pool.read.scorer))
    if pool.budget is not None:
        yield f"cadence {min(pool.cadence, 2)}, paged {pool.page > 1}"
        yield f"scope {pool.scope}, floor {pool.floor > 0}"
        yield f"victims {min(pool.victims, 2)}"
        yield from (f"{key[0]} reads {word.partition('(')[0]}" for key, q in pool.quantities() for word in q.names)
        yield from (f"at {min(pool.cadence, 1)}: {word}" for word in scorer_features(pool.scorer))


def scorer_features(scorer: ScorerPlan) -> Iterator[str]:
    yield f"op {scorer.op}"
    for leaf in scorer.leaves():
        yield f"signal {leaf.signal}, paged or not"
        yield f"queries {'last' if isinstance(leaf.queries, int) else leaf.queries}"
        yield f"over {leaf.over}"
        yield f"heads {leaf.heads}"
        yield f"smooth {leaf.smooth and leaf.smooth[0]}"
        yield f"norm {leaf.norm}"
        yield f"hit {leaf.hit and leaf.hit[0]}"
        yield f"memory {leaf.memory[0]}"


def unscored(plan: Plan) -> frozenset[str]:
    """The words for pools, stores, budgets and cadences: all that meets what goes on around a step."""
    return frozenset(word for word in features(plan) if not word.startswith(("pool: at ", "pool: read ")))


def cover(names: Iterable[str], words: Callable[[Plan], frozenset[str]]) -> list[str]:
    """Few policies that show between them everything that any of them shows: the greedy choice."""
    shown = {name: words(plan_of(tight(name), (5, 24), 40)) for name in names}
    missing, chosen = frozenset().union(*shown.values()), []
    while missing:
        best = max(shown, key=lambda name: (len(shown[name] & missing), name))
        chosen.append(best)
        missing -= shown[best]
    return sorted(chosen)


COVER = cover(NAMES, features)
SHAPES = cover(NAMES, unscored)
"""For what surrounds a step: loops, copies, recorded steps, buckets of lengths, a cache that drops nothing."""


def thorough(names: Iterable[str] = NAMES, among: Iterable[str] = COVER) -> list[Any]:
    """The names as parameters, those outside ``among`` for the slow run only."""
    return [name if name in among else pytest.param(name, marks=pytest.mark.slow) for name in names]


def spread(names: Iterable[str], others: Iterable[Any], among: Iterable[str] | None = None) -> list[Any]:
    """Pairs of every name with every other thing; in the normal run each name (``among`` these) meets one, in turn."""
    names, others = list(names), list(others)
    quick = names if among is None else [name for name in names if name in among]
    turn = {name: at % len(others) for at, name in enumerate(quick)}
    return [
        pytest.param(name, other, marks=() if turn.get(name) == at else pytest.mark.slow)
        for name in names
        for at, other in enumerate(others)
    ]
