"""A budget for any policy: settings of its params with which it holds so many tokens in all.

No policy is known by name. A param is a *size* where halving it lowers what a policy holds of an endless text by at
least a quarter of its value, and leaves the pages as they are. A size called ``budget`` is set alone; otherwise all
sizes are scaled by one factor. Params that the user set stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.language import Policy, QuantityError
from kvpolicy.plan import ModelGeometry, Plan, make_plan

HALVINGS = 16
"""How often a param is halved, and how often all are doubled, in search of the budget."""

LARGE = Fraction(64)
"""Tokens, at least so many of which a share of a short prompt is taken for: of two, the half tells nothing."""

ENDLESS = 10**7
"""Tokens of a text in which every pool gets as full as it may."""

Values = dict[str, Fraction]
Planner = Callable[[Values], Plan]


@dataclass(frozen=True)
class Budgeted:
    """A policy that holds a budget. ``settings`` are what ``--set`` would say; ``held``: the plan's bound, the mean of
    its layers; ``plan``: of a single row."""

    policy: Policy
    settings: dict[str, str]
    held: int
    plan: Plan


def with_budget(
    policy: Policy,
    budget: int | None,
    geometry: ModelGeometry,
    *,
    prompt: int,
    max_new_tokens: int,
    given: Mapping[str, str] | None = None,
) -> Budgeted:
    """The policy with params under which it holds ``budget`` tokens, a few less where pages or shares are rounded.

    Args:
        budget: None leaves the policy as it is.
        prompt, max_new_tokens: tokens of the text it is for; params that are shares of the prompt become numbers.
        given: params that the user set; they are put in and stay.

    Raises:
        UsageError: no scaling of its params comes to the budget, or the prompt alone is more than that.
        PolicyError: the policy cannot be resolved for this shape.
    """
    given = dict(given or {})
    base = policy.bind(**given) if given else policy
    shape = geometry if minds_layers(base) else replace(geometry, layers=1)
    planner = partial(_planner, base, given)
    found: Values = {}
    if budget is not None:
        values = _numbers(base, given, prompt, max_new_tokens)
        search = _Search(budget, planner(shape, prompt, max_new_tokens))
        endless = [planner(shape, ENDLESS, ENDLESS), planner(shape, prompt, ENDLESS)]
        fit = search.run(values, lambda: [name for name in values if _is_size(name, values[name], endless)])
        if fit is None:
            raise UsageError(
                f"no scaling of the params of {policy.name} makes it hold {budget:,} tokens beside a prompt of "
                f"{prompt:,} and {max_new_tokens:,} new ones{search.reason}; set its params yourself with "
                "--set NAME=VALUE, without --budget"
            )
        found = fit
    settings = {**given, **settings_of(found)}
    plan = planner(geometry, prompt, max_new_tokens)(found)
    return Budgeted(base.bind(**settings) if settings else base, settings, held_by(plan), plan)


def sizes_of(
    policy: Policy,
    geometry: ModelGeometry,
    *,
    prompt: int,
    max_new_tokens: int,
    given: Mapping[str, str] | None = None,
) -> Values:
    """The params that are sizes, and what they are at these lengths; those that were given are none."""
    given = dict(given or {})
    base = policy.bind(**given) if given else policy
    shape = geometry if minds_layers(base) else replace(geometry, layers=1)
    endless = [_planner(base, given, shape, length, ENDLESS) for length in (ENDLESS, prompt)]
    values = _numbers(base, given, prompt, max_new_tokens)
    shares = {name for name, value in values.items() if value >= 1 and base.params[name].value.constant is None}
    asked = {name: max(value, LARGE) if name in shares else value for name, value in values.items()}
    return {name: value for name, value in values.items() if _is_size(name, asked[name], endless)}


def _planner(base: Policy, given: Mapping[str, str], shape: ModelGeometry, prompt: int, new: int) -> Planner:
    """Plans of a policy for these lengths, by values of its other params.

    A search comes back to the same values again and again, once they are rounded: each plan is made once.
    """
    made: dict[frozenset[tuple[str, Fraction]], Plan | PolicyError | UsageError] = {}

    def fresh(values: Values) -> Plan:
        bound = base.bind(**given, **settings_of(values)) if values else base
        return make_plan(bound, shape, prompt=prompt, max_new_tokens=new)

    def plan_for(values: Values) -> Plan:
        key = frozenset(values.items())
        if key not in made:
            try:
                made[key] = fresh(values)
            except (PolicyError, UsageError) as refusal:
                made[key] = refusal
        found = made[key]
        if isinstance(found, Plan):
            return found
        raise found

    return plan_for


class _Search:
    """Looks for values of params with which a policy holds a budget; ``reason`` is the first refusal on the way."""

    def __init__(self, budget: int, plan_for: Planner) -> None:
        self.budget, self.plan_for, self.reason = budget, plan_for, ""

    def held(self, values: Values) -> int | None:
        try:
            return held_by(self.plan_for(values))
        except (PolicyError, UsageError) as refusal:
            self.reason = self.reason or f" ({str(refusal).splitlines()[0]})"
            return None

    def run(self, values: Values, sizes: Callable[[], list[str]]) -> Values | None:
        """Settings that come to the budget, of ``budget`` alone or of all ``sizes``; None where there are none."""
        direct = {"budget": Fraction(self.budget)}
        if "budget" in values and self._fits(direct):
            return direct
        names = sizes()
        chosen = {name: values[name] for name in (["budget"] if "budget" in names else names)}
        scaled: Values | None = self._bisect(chosen) if chosen else {}
        if scaled is None:
            return None
        for name in sorted(chosen, key=lambda name: -chosen[name]):  # what rounding left over, to the largest it fits
            missing = self.budget - (self.held(scaled) or self.budget)
            more = scaled | {name: scaled[name] + missing}
            if missing and scaled[name].denominator == 1 and (self.held(more) or self.budget + 1) <= self.budget:
                scaled = more
        return scaled if self._fits(scaled) else None

    def _fits(self, values: Values) -> bool:
        """Whether this comes to the budget but for a page, or for a token or two that rounding takes."""
        tokens = self.held(values)
        if tokens is None:
            return False
        page = max(pool.page for layer in self.plan_for(values).layers for pool in layer.pools)
        return abs(tokens - self.budget) <= max(2, page)

    def _bisect(self, sizes: Values) -> Values | None:
        """The smallest scaling of all sizes that holds the most that is not above the budget; None where all is."""

        def scaled(factor: Fraction) -> Values:
            return {name: _scaled(value, factor) for name, value in sizes.items()}

        def last(low: Fraction, high: Fraction, wanted: Callable[[int], bool]) -> Fraction:
            """The largest factor of which ``wanted`` says yes, where it does so from ``low`` on and not at ``high``."""
            for _ in range(24):
                middle = (low + high) / 2
                tokens = self.held(scaled(middle))
                low, high = (middle, high) if tokens is not None and wanted(tokens) else (low, middle)
            return low

        high = Fraction(1)
        while (self.held(scaled(high)) or self.budget + 1) <= self.budget and high < 2**HALVINGS:
            high *= 2
        largest = last(Fraction(0), high, lambda tokens: tokens <= self.budget)
        if not largest:
            return None
        most = self.held(scaled(largest)) or 0
        below = last(Fraction(0), largest, lambda tokens: tokens < most)
        smallest = scaled(below + (largest - below) / 2**10)
        return smallest if self.held(smallest) == most else scaled(largest)


def _is_size(name: str, value: Fraction, planners: list[Planner]) -> bool:
    """Whether a param says how many tokens stay; see the module's docstring. The first planner that has a plan asks."""
    if value <= 0:
        return False
    for plan_for in planners:
        last: tuple[Fraction, Plan] | None = None
        for tried in _halved(value):
            try:
                plan = plan_for({name: tried})
            except (PolicyError, UsageError):
                continue
            if last is not None and _pages(last[1]) != _pages(plan):
                return False
            if last is not None and held_by(last[1]) - held_by(plan) >= max(Fraction(1), last[0] / 4):
                return True
            last = tried, plan
        if last is not None:
            return False
    return False


def _halved(value: Fraction) -> Iterator[Fraction]:
    """A param's value, its half, and so on."""
    for halving in range(HALVINGS):
        yield (tried := _scaled(value, Fraction(1, 2**halving)))
        if tried <= (1 if value >= 1 else Fraction(1, 100)):
            return


def _numbers(policy: Policy, given: Mapping[str, str], prompt: int, new: int) -> Values:
    """Params that are numbers at these lengths, but for those that were given."""
    known = {"prompt_len": prompt, "context": prompt + new, "t": new, "max_new_tokens": new}
    found = {}
    for name, param in policy.params.items():
        value = param.value.fold(known)
        if name in given or value.constant is None:
            continue
        found[name] = value.constant
    return found


def _scaled(value: Fraction, factor: Fraction) -> Fraction:
    """A size in tokens stays a whole number of them, at least 1; a share is in ten-thousandths."""
    if value >= 1:
        return Fraction(max(1, round(value * factor)))
    return Fraction(max(1, round(value * factor * 10_000)), 10_000)


def settings_of(values: Mapping[str, Fraction]) -> dict[str, str]:
    """Values as ``--set`` takes them."""
    return {
        name: str(value.numerator) if value.denominator == 1 else str(float(value)) for name, value in values.items()
    }


def held_by(plan: Plan) -> int:
    """Tokens held after an update per row and KV head, the mean of the layers."""
    return round(Fraction(sum(plan.even(layer).bound for layer in plan.layers), len(plan.layers)))


def _pages(plan: Plan) -> list[int]:
    return [pool.page for layer in plan.layers for pool in layer.pools]


def minds_layers(policy: Policy) -> bool:
    """Whether layers may differ. Raises nothing: what cannot be folded is not about layers."""
    if policy.overrides:
        return True
    try:
        texts = policy.model_dump_json(include={"pools"})
    except QuantityError:
        return True
    return "layer" in texts
