"""Which policies run at which budgets: those asked for, and beside them always the full cache and two controls.

A budget is tokens held, whatever a policy's params are called (``bench/budgets.py``). A policy that selects, reading a
part of what it holds in each step, is given it as tokens read: that is what its ``budget`` means. One that cuts prompts
alone holds all that is generated: where that leaves nothing of the budget, it is given it as tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.lab.bench.budgets import held_by, with_budget
from kvpolicy.language import Policy, load_policy
from kvpolicy.plan import ModelGeometry, Plan, PoolPlan, make_plan

FULL = "dense"
CONTROLS = (("window",), ("random", "random-unpinned"))
"""Beside every policy at every budget; of each the first that can hold the budget. What is no better than these was not
worth its scores."""


@dataclass(frozen=True)
class Arm:
    """A policy at a budget. None: with its own params. ``given``: params that the user set. ``control``: nobody asked
    for it; ``others`` stand in for it where it cannot have the budget."""

    label: str
    policy: Policy
    budget: int | None
    given: Mapping[str, str] = field(default_factory=dict)
    control: bool = False
    others: tuple[Arm, ...] = ()

    @property
    def name(self) -> str:
        """`h2o at 64`."""
        return self.label if self.budget is None else f"{self.label} at {self.budget:,}"


@dataclass(frozen=True)
class Bound:
    """An arm with its params found for a length: ``settings`` as ``--set`` says them; ``held`` tokens stay after an
    update, the mean of the layers."""

    arm: Arm
    policy: Policy
    settings: Mapping[str, str]
    held: int
    plan: Plan


def arms(policies: Sequence[tuple[str, Policy, Mapping[str, str]]], budgets: Sequence[int | None]) -> list[Arm]:
    """The full cache, then (label, policy, given params) at every budget, then the controls that are not among them.

    Controls have only budgets that are numbers.
    """
    found = [Arm(FULL, load_policy(FULL), None, control=True)]
    asked = {policy.name for _, policy, _ in policies}
    for label, policy, given in policies:
        if policy.name != FULL:
            found += [Arm(label, policy, budget, given) for budget in budgets]
    for names in CONTROLS:
        if names[0] in asked:
            continue
        for budget in budgets:
            if budget is not None:
                first, *others = (Arm(name, load_policy(name), budget, control=True) for name in names)
                found.append(Arm(first.label, first.policy, budget, control=True, others=tuple(others)))
    return found


def bound(arm: Arm, geometry: ModelGeometry, *, prompt: int, max_new_tokens: int) -> Bound:
    """The arm's policy with params under which it has its budget on a text of this length.

    Raises:
        UsageError: it cannot have it, nor can any that stands in for it.
        PolicyError: the policy cannot be resolved for this shape.
    """
    refusal: UsageError | PolicyError | None = None
    for each in (arm, *arm.others):
        try:
            return _bound(each, geometry, prompt, max_new_tokens)
        except (UsageError, PolicyError) as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _bound(arm: Arm, geometry: ModelGeometry, prompt: int, max_new_tokens: int) -> Bound:
    lengths = {"prompt": prompt, "max_new_tokens": max_new_tokens}
    own = arm.policy.bind(**arm.given) if arm.given else arm.policy
    if arm.budget is not None and arm.budget >= prompt + max_new_tokens - 1:
        raise UsageError(
            f"a budget of {arm.budget:,} tokens holds all of a text of {prompt:,} and {max_new_tokens:,} new ones: "
            "nothing would be evicted; give a smaller one with --budgets, or longer texts with --size"
        )
    free = arm.budget is not None and "budget" in own.params and "budget" not in arm.given
    if free and (made := _plan(own, geometry, **lengths)) is not None:
        if not works(made):
            layers = f"each of the {geometry.layers} layers" if geometry.layers > 1 else "the one layer"
            raise UsageError(
                f"{own.name} drops nothing and leaves nothing unread in {layers} of this model, so no budget reaches it"
            )
        if selects(made):
            return _directly(arm, own, geometry, lengths)
    try:
        found = with_budget(arm.policy, arm.budget, geometry, given=arm.given, **lengths)
    except UsageError:
        if not free or made is None or not cuts_prompts_alone(made):
            raise
        return _directly(arm, own, geometry, lengths)
    return Bound(arm, found.policy, found.settings, found.held, found.plan)


def _plan(policy: Policy, geometry: ModelGeometry, **lengths: int) -> Plan | None:
    """The plan of a policy as it is; None where its own params do not fit these lengths."""
    try:
        return make_plan(policy, geometry, **lengths)
    except (UsageError, PolicyError):
        return None


def _directly(arm: Arm, own: Policy, geometry: ModelGeometry, lengths: Mapping[str, int]) -> Bound:
    """The budget is what the policy's param of that name says, whatever is held in all."""
    chosen = own.bind(budget=str(arm.budget))
    plan = make_plan(chosen, geometry, **lengths)
    return Bound(arm, chosen, {**arm.given, "budget": str(arm.budget)}, held_by(plan), plan)


def works(plan: Plan) -> bool:
    """Whether some pool may drop anything, hand it on, or leave it unread."""
    return any(pool.evicts or pool.to is not None or pool.read is not None for pool in _pools(plan))


def cuts_prompts_alone(plan: Plan) -> bool:
    """Whether all that is generated stays, so that only a prompt can be held to a budget."""
    return not any(pool.evicts and "generated" in pool.admits for pool in _pools(plan))


def selects(plan: Plan) -> bool:
    """Whether some step reads only a part of what it holds, if that is long enough."""
    return any(pool.read is not None for pool in _pools(plan))


def leaves_unread(plan: Plan, prompt: int, new: int) -> bool:
    """Whether a text of so many tokens is long enough for a step that reads only a part of some pool."""
    for pool in _pools(plan):
        came = (prompt if "prompt" in pool.admits else 0) + (new - 1 if "generated" in pool.admits else 0)
        if pool.read is not None and min(came, pool.capacity) > (pool.read_units + 1) * pool.page:
            return True
    return False


def _pools(plan: Plan) -> Iterator[PoolPlan]:
    return (pool for layer in plan.layers for pool in layer.pools)
