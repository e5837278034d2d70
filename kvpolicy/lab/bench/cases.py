"""What one arm runs: a policy at a budget or a full cache at a length, the prompt, and the steps before timing.

The *context* is every token of the text, timed steps included: a full cache is exactly full after its last step. A
policy is timed from when every pool that takes generated tokens has evicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.lab.bench.budgets import Budgeted, with_budget
from kvpolicy.language import Policy
from kvpolicy.plan import ModelGeometry, Plan, PoolPlan, make_plan
from kvpolicy.plan.timeline import timeline

WARM = 16
"""Steps before anything is timed, at the least: kernels are chosen, compiled and captured in them."""

LOOKED_AT = 4
"""The last steps of the warm-up, in which memory is measured, and as many again in which launches are counted."""

CYCLES = 4
"""Updates that come before the first timed step: each kind of step is captured after it ran a few times."""

SHARES = (15 / 16, 1 / 2, 1 / 4)
"""Prompts, as shares of a budget, that a policy gets which cannot hold the whole context: the first that fits."""


@dataclass(frozen=True)
class Case:
    """One arm's text and cache.

    prompt: tokens that the model reads. room: tokens that stand before the first step; where more than the prompt, a
    full cache is filled up to them with random numbers. warm: steps before the first timed one. fires: whether an
    update of a generated step can drop anything.
    """

    label: str
    policy: Policy
    settings: Mapping[str, str]
    plan: Plan
    batch: int
    context: int
    budget: int | None
    held: int
    prompt: int
    room: int
    warm: int
    steps: int
    fires: bool
    note: str = ""

    @property
    def slots(self) -> int:
        """Tokens allocated per row and KV head, the mean of the layers."""
        return round(sum(self.plan.even(layer).slots for layer in self.plan.layers) / len(self.plan.layers))


def full_cache(
    policy: Policy, length: int, geometry: ModelGeometry, *, batch: int, steps: int, prompt: int | None = None
) -> Case:
    """The project's own full cache, ``length`` tokens long after its last step.

    Raises:
        UsageError: there is no room for the steps.
    """
    new = WARM + steps
    room = length - new
    if room < 1:
        raise UsageError(
            f"a text of {length:,} tokens has no room for {new:,} steps ({WARM} of them warm up); lower --new-tokens, "
            "or give a longer --context and a larger --budget"
        )
    read = min(room, prompt or room)
    plan = make_plan(policy, geometry, batch=batch, prompt=(read, room), max_new_tokens=new)
    return Case("dense", policy, {}, plan, batch, length, None, length, read, room, WARM, steps, False)


def policy_case(
    policy: Policy,
    label: str,
    geometry: ModelGeometry,
    *,
    context: int,
    budget: int | None,
    batch: int,
    steps: int,
    prompt: int | None = None,
    given: Mapping[str, str] | None = None,
) -> Case:
    """A policy that holds ``budget`` tokens of a text of ``context``.

    Args:
        steps: generated tokens after the warm-up.
        prompt: tokens that the model reads; None: all but the steps, or what the policy can hold where it pins them.
        given: params that the user set.

    Raises:
        UsageError: nothing would be evicted, or the policy cannot be given this budget.
    """
    if budget is not None and budget >= context:
        raise UsageError(
            f"a budget of {budget:,} tokens and a context of {context:,} leave nothing to evict; give a longer "
            "--context or a smaller --budget"
        )
    new = steps + WARM
    while new < context:
        try:
            found, read = _planned(policy, geometry, context - new, new, budget, prompt, given)
        except UsageError:
            if budget is None or new > budget:  # a longer text would not help
                raise
            new = min(2 * new, budget + 1)
            continue
        ready = _ready(found.plan)
        needed = WARM if ready is None else max(WARM, ready + 2 * LOOKED_AT)
        if ready is not None and needed + steps <= new:
            plan = make_plan(found.policy, geometry, batch=batch, prompt=read, max_new_tokens=new)
            note = "" if read == (prompt or context - new) else f"its prompt must fit the budget: {read:,} tokens read"
            fires = any(_evicts_generated(pool) for layer in plan.layers for pool in layer.pools)
            warm = new - steps
            return Case(
                label, found.policy, found.settings, plan, batch, context, budget, found.held,
                read, read, warm, steps, fires, note,
            )  # fmt: skip
        new = max(new + 1, min(2 * new, new + 4096) if ready is None else needed + steps)
    raise UsageError(
        f"{label} evicts nothing within a context of {context:,} tokens, {steps:,} of them timed; give a longer "
        "--context, a smaller --budget, or smaller params with --set"
    )


def _planned(
    policy: Policy,
    geometry: ModelGeometry,
    room: int,
    new: int,
    budget: int | None,
    prompt: int | None,
    given: Mapping[str, str] | None,
) -> tuple[Budgeted, int]:
    """The policy at its budget, and the longest prompt that it takes."""
    refusal: UsageError | PolicyError | None = None
    for length in _prompts(min(room, prompt or room), budget):
        try:
            return with_budget(policy, budget, geometry, prompt=length, max_new_tokens=new, given=given), length
        except UsageError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _prompts(longest: int, budget: int | None) -> Iterator[int]:
    yield longest
    if budget is not None:
        yield from (length for share in SHARES if 0 < (length := int(budget * share)) < longest)


def _ready(plan: Plan) -> int | None:
    """The step by which every pool that evicts generated tokens has done so, and some updates after it; 0 for
    policies that only cut the prompt; None where that does not come within the plan's steps."""
    last = evicted = 0
    for layer in dict.fromkeys(replace(layer, index=0) for layer in plan.layers):
        for pool, line in zip(layer.pools, timeline(plan, layer), strict=True):
            evicted += line.evicted
            if not _evicts_generated(pool):
                continue
            grew = (line.resident[t] == line.resident[t - 1] + 1 for t in range(1, plan.max_new_tokens + 1))
            fired = next((t for t, more in enumerate(grew, 1) if not more), None)
            if fired is None:
                return None
            last = max(last, fired + CYCLES * max(pool.cadence, pool.page))
    return last if evicted else None


def _evicts_generated(pool: PoolPlan) -> bool:
    return pool.evicts and pool.cadence > 0 and "generated" in pool.admits
