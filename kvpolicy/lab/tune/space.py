"""Which params of a policy are searched, and which values each may take: as its language and the lengths allow.

Nothing is known of a policy by name. What a param counts is what the places count where its value ends up
(``language/uses.py``), and every value is tried on the language and on a plan before it is one of the param's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.lab.bench.budgets import settings_of, sizes_of
from kvpolicy.lab.tune.sizing import Settings, Sizer
from kvpolicy.language import Policy, Quantity
from kvpolicy.language.scope import Role
from kvpolicy.language.uses import Path, numbers
from kvpolicy.language.vocabulary import nearest

Kind = Literal["whole", "share", "number"]

FINE = 8
"""Up to this, every whole number is tried; above, two to a doubling."""

SHARES = (Fraction(1, 100), Fraction(2, 100), *(Fraction(part, 20) for part in range(1, 21)))

REACH = 16
"""A number that the language sets no limits is tried from this part of its default to this many times it."""

LUCK = "seed"
"""The language's word for an argument that says which luck one has. The best of several would be luck as well."""


@dataclass(frozen=True)
class Axis:
    """A param that is searched. ``values``: those that the language takes beside the defaults of the others, ascending;
    ``default`` at these lengths. ``size``: it says how many tokens stay, and is scaled to come to a memory.
    ``percent``: how it is written."""

    name: str
    kind: Kind
    default: Fraction
    values: tuple[Fraction, ...]
    size: bool
    percent: bool = False

    def spelled(self, value: Fraction) -> str:
        """A value as ``--set`` takes it, in per cent where the default is."""
        return f"{float(100 * value):g}%" if self.percent else settings_of({self.name: value})[self.name]

    @property
    def range(self) -> str:
        """Where it is searched, for a reader."""
        if self.size:
            return f"scaled to the memory, from {self.spelled(self.values[0])} up"
        shown = ", ".join(map(self.spelled, self.values)) if len(self.values) <= 4 else ""
        return shown or f"{self.spelled(self.values[0])} to {self.spelled(self.values[-1])}, {len(self.values)} values"


@dataclass(frozen=True)
class Space:
    """What is searched, what stays as the user set it, and why any other param is left alone."""

    axes: tuple[Axis, ...]
    given: Settings
    left: Mapping[str, str]

    @property
    def sizes(self) -> tuple[Axis, ...]:
        return tuple(axis for axis in self.axes if axis.size)

    @property
    def others(self) -> tuple[Axis, ...]:
        return tuple(axis for axis in self.axes if not axis.size)


def space(sizer: Sizer, given: Settings, only: Collection[str] = ()) -> Space:
    """The params of a policy as a space to search.

    Args:
        given: params that the user set; they stay.
        only: params to search; all unless given.

    Raises:
        UsageError: the policy has no such param, or none that is left to search.
        PolicyError: what is given makes no sense.
    """
    policy = sizer.policy
    check_names(policy, given, only)
    rest = [name for name in policy.params if name not in given and (not only or name in only)]
    left = {name: "set to " + value for name, value in given.items()}
    left |= {name: "not asked for" for name in policy.params if name not in given and name not in rest}
    lengths = sizer.lengths
    sizes = sizes_of(policy, sizer.geometry, prompt=lengths.prompt[1], max_new_tokens=lengths.new_tokens, given=given)
    base = _base(sizer, given, {name: value for name, value in sizes.items() if name in rest})
    stands = policy.bind(**given) if given else policy
    axes = []
    for name in rest:
        found = _axis(sizer, stands.params[name].value, name, base, size=name in sizes, asked=name in only)
        if isinstance(found, Axis):
            axes.append(found)
        else:
            left[name] = found
    if not axes:
        why = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise UsageError(f"{policy.name} has no param left to search ({why})")
    return Space(tuple(axes), given, left)


def check_names(policy: Policy, given: Mapping[str, str], only: Collection[str]) -> None:
    """Raise UsageError where the policy has no params, or none of a name that is to be searched, or that one is set."""
    if not policy.params:
        raise UsageError(f"{policy.name} has no params, so there is nothing to tune; give a policy that has some")
    for name in only:
        if name not in policy.params:
            raise UsageError(f"--only {name}: {policy.name} has no such param; {nearest(name, policy.params)}")
    both = sorted(set(given) & set(only))
    if both:
        raise UsageError(f"--only asks to search {both[0]} and --set fixes it; drop one")


def _base(sizer: Sizer, given: Settings, sizes: Mapping[str, Fraction]) -> Settings:
    """Settings beside which a param's values are tried: as the policy stands, or with sizes that fit the text."""
    for doubling in range(16):
        wider = settings_of({name: value * 2**doubling for name, value in sizes.items() if value >= 1})
        base = given | (wider if doubling else {})
        if sizer(base) is not None:
            return base
    raise UsageError(f"{sizer.policy.name} cannot run at these lengths whatever its sizes: {sizer.refusal}")


def _axis(sizer: Sizer, value: Quantity, name: str, base: Settings, *, size: bool, asked: bool) -> Axis | str:
    """The param as an axis, or why it is none.

    Args:
        value: what it is by default.
        asked: it was named, so that a seed is searched as well.
    """
    lengths = sizer.lengths
    default = value.fold(
        {
            "prompt_len": lengths.prompt[1],
            "context": lengths.whole,
            "t": lengths.new_tokens,
            "max_new_tokens": lengths.new_tokens,
        }
    )
    if default.constant is None:
        return f"its default, {value.text}, is no number at these lengths"
    uses = _uses(sizer, name, default.constant, base)
    if not uses:
        return "nothing depends on it"
    if not asked and all(where[-1] == LUCK for where in uses):
        return "luck: the best of several seeds would be no better on another text"
    kind = _kind(default.share, default.constant, list(uses.values()))
    tried = _ladder(kind, default.constant, list(uses.values()), lengths.whole)
    values = tuple(sorted({value for each in tried for value in _taken(sizer, name, each, base, kind)}))
    if len(values) < 2 and not size:
        return f"no value but {settings_of({name: default.constant})[name]} fits these lengths"
    return Axis(name, kind, default.constant, values or (default.constant,), size, percent=default.share)


def _uses(sizer: Sizer, name: str, value: Fraction, base: Settings) -> dict[Path, Role]:
    """The places whose numbers change with a param, and what they count."""
    before = _numbers(sizer, base)
    for other in (value + 1, value * 2, value / 2, value + 2, value - 1, value - 2):
        after = _numbers(sizer, base | settings_of({name: other})) if other >= 0 else {}
        changed = {where: role for where, (role, text) in after.items() if before.get(where) != (role, text)}
        if changed:
            return changed
    return {}


def _numbers(sizer: Sizer, settings: Settings) -> dict[Path, tuple[Role, str]]:
    try:
        policy = sizer.policy.bind(**settings)
    except PolicyError:
        return {}
    return {where: (role, quantity.canonical) for where, role, quantity in numbers(policy)}


def _kind(share: bool, default: Fraction, roles: list[Role]) -> Kind:
    """A share where it is written as one, or counts nothing but shares; a whole number where tokens or passes are
    counted; else any number."""
    if share or all(role.unit == "share" for role in roles):
        return "share"
    if default.denominator == 1 and any(role.unit in ("tokens", "count") for role in roles):
        return "whole"
    return "whole" if default > 1 and any(role.unit == "tokens" for role in roles) else "number"


def _ladder(kind: Kind, default: Fraction, roles: list[Role], most: int) -> Iterator[Fraction]:
    """Values to be tried, the default among them."""
    yield Fraction(round(default)) if kind == "whole" else default
    if kind == "share":
        yield from SHARES
    elif kind == "whole":
        yield from map(Fraction, range(min(FINE, most) + 1))
        yield from (value for value in _halves(most) if value <= most)
        yield Fraction(most)
    else:
        least = max((role.least for role in roles if role.least is not None), default=None)
        top = min((role.most for role in roles if role.most is not None), default=None)
        around = default or Fraction(1)
        for halves in range(-8, 9):
            value = _short(float(around) * REACH ** (halves / 8))
            if (least is None or value >= least) and (top is None or value <= top):
                yield value


def _halves(most: int) -> Iterator[Fraction]:
    """Half octaves above ``FINE``, beyond ``most`` at last."""
    return (Fraction(round(FINE * 2 ** (half / 2))) for half in range(1, 2 * (most // FINE).bit_length() + 1))


def _short(value: float) -> Fraction:
    """Two digits that count."""
    return Fraction(f"{value:.1e}")


def _taken(sizer: Sizer, name: str, value: Fraction, base: Settings, kind: Kind) -> Iterator[Fraction]:
    """The value, if it is one; of whole numbers, the next where this one is refused (odd widths, say)."""
    if sizer.takes(base | settings_of({name: value})):
        yield value
    elif kind == "whole" and sizer.takes(base | settings_of({name: value + 1})):
        yield value + 1
