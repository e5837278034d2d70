"""Intervals and directions: what a quantity can be worth, and which way it moves as text grows."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, NamedTuple

from kvpolicy.language.algebra import NEVER_ZERO, compute
from kvpolicy.language.syntax import LIMIT, QuantityError, too_large
from kvpolicy.language.vocabulary import AT_LEAST

Number = Fraction | float
"""An exact number, or an infinity."""


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included; an end without limit is -math.inf or math.inf."""

    low: Number
    high: Number

    def __post_init__(self) -> None:
        for end in ("low", "high"):
            value = getattr(self, end)
            if not isinstance(value, Fraction) and not (isinstance(value, float) and math.isinf(value)):
                object.__setattr__(self, end, Fraction(value))
        if self.low > self.high:
            raise ValueError(f"a range from {self.low} to {self.high} is empty")

    def __contains__(self, value: Number) -> bool:
        return self.low <= value <= self.high

    @property
    def point(self) -> Fraction | None:
        """The only number in the range, if there is only one."""
        return self.low if isinstance(self.low, Fraction) and self.low == self.high else None


ZERO, ONE = Fraction(0), Fraction(1)


def default_range(name: str) -> Range:
    """What is known of a free name before any plan: none is negative."""
    return Range(Fraction(AT_LEAST.get(name, 0)), math.inf)


def times(x: Number, y: Number) -> Number:
    """Product, where 0 times infinity is 0: a range's end is a limit, never reached."""
    return ZERO if 0 in (x, y) else x * y


def product(x: Range, y: Range) -> Range:
    ends = [times(a, b) for a in (x.low, x.high) for b in (y.low, y.high)]
    return Range(min(ends), max(ends))


def reciprocal(y: Range) -> Range:
    if 0 in y:
        raise QuantityError("the divisor may be 0 here", hint=NEVER_ZERO)
    low, high = (ZERO if math.isinf(end) else ONE / end for end in (y.high, y.low))
    return Range(low, high)


def stepwise(operation: str, x: Range) -> Range:
    """A function that never falls, end by end."""
    ends = [end if math.isinf(end) else compute(operation, [Fraction(end)]) for end in (x.low, x.high)]
    return Range(*ends)


def truth(always: bool, never: bool) -> Range:
    return Range(ONE if always else ZERO, ZERO if never else ONE)


def compare(operation: str, x: Range, y: Range) -> Range:
    if operation in (">", ">="):
        operation, x, y = operation.replace(">", "<"), y, x
    if operation == "<":
        return truth(x.high < y.low, x.low >= y.high)
    if operation == "<=":
        return truth(x.high <= y.low, x.low > y.high)
    return truth(x.point is not None and x.point == y.point, x.high < y.low or y.high < x.low)


def sure(x: Range) -> Range:
    """Whether x differs from 0: [1, 1], [0, 0] or [0, 1]."""
    return truth(0 not in x, x.point == 0)


def cosine(x: Range) -> Range:
    if x.point is None:
        return Range(-ONE, ONE)
    value = compute("cos", [x.point])
    return Range(value, value)


@dataclass(frozen=True)
class Interval:
    """Intervals: a range that holds every value the tree can take while its names keep within theirs."""

    ranges: Mapping[str, Range]

    def const(self, value: Fraction, share: bool) -> Range:
        return Range(value, value)

    def name(self, name: str) -> Range:
        return self.ranges[name] if name in self.ranges else default_range(name)

    def apply(self, operation: str, arguments: Sequence[Range]) -> Range:
        result = combine(operation, arguments)
        for end in (result.low, result.high):
            if isinstance(end, Fraction) and max(abs(end.numerator), end.denominator) > LIMIT:
                raise too_large("the result")
        return result


def combine(operation: str, arguments: Sequence[Range]) -> Range:
    """One operation on ranges."""
    x, y, z = (*arguments, arguments[0], arguments[0], arguments[0])[:3]
    match operation:
        case "+":
            return Range(x.low + y.low, x.high + y.high)
        case "-":
            return Range(x.low - y.high, x.high - y.low)
        case "*":
            return product(x, y)
        case "/":
            return product(x, reciprocal(y))
        case "//":
            return stepwise("floor", product(x, reciprocal(y)))
        case "neg":
            return Range(-x.high, -x.low)
        case "floor" | "ceil" | "round":
            return stepwise(operation, x)
        case "cos":
            return cosine(x)
        case "and" | "or":
            x, y = sure(x), sure(y)
            pick = min if operation == "and" else max
            return Range(pick(x.low, y.low), pick(x.high, y.high))
        case "if":
            condition = sure(x)
            if condition.point is not None:
                return y if condition.point else z
            return Range(min(y.low, z.low), max(y.high, z.high))
        case "min":
            return Range(min(a.low for a in arguments), min(a.high for a in arguments))
        case "max":
            return Range(max(a.low for a in arguments), max(a.high for a in arguments))
        case "clamp":
            return Range(min(max(x.low, y.low), z.low), min(max(x.high, y.high), z.high))
    return compare(operation, x, y)


# Direction -------------------------------------------------------------------------------------------------------

Direction = Literal["constant", "up", "down", "unknown"]
TURNED: dict[Direction, Direction] = {"up": "down", "down": "up", "constant": "constant", "unknown": "unknown"}


class Moving(NamedTuple):
    """A direction and the range it moves in."""

    way: Direction
    range: Range


def together(*ways: Direction) -> Direction:
    """The direction of something that rises with each of its parts."""
    moving = {way for way in ways if way != "constant"}
    if not moving:
        return "constant"
    return moving.pop() if len(moving) == 1 else "unknown"


def scaled(way: Direction, factor: Range) -> Direction:
    """The direction of a moving thing times a factor that stands still."""
    if factor.low >= 0:
        return way
    return TURNED[way] if factor.high <= 0 else together(way, TURNED[way])


@dataclass
class Monotone:
    """Directions: how a tree moves when the names in `moving` grow by steps of one and all others stand still."""

    moving: Collection[str]
    interval: Interval = field(default_factory=lambda: Interval({}))

    def const(self, value: Fraction, share: bool) -> Moving:
        return Moving("constant", Range(value, value))

    def name(self, name: str) -> Moving:
        return Moving("up" if name in self.moving else "constant", self.interval.name(name))

    def apply(self, operation: str, arguments: Sequence[Moving]) -> Moving:
        result = self.interval.apply(operation, [argument.range for argument in arguments])
        if result.point is not None or all(argument.way == "constant" for argument in arguments):
            return Moving("constant", result)
        return Moving(self.way(operation, arguments), result)

    def way(self, operation: str, arguments: Sequence[Moving]) -> Direction:
        x, y, z = (*arguments, arguments[0], arguments[0], arguments[0])[:3]
        match operation:
            case "+" | "min" | "max" | "clamp" | "floor" | "ceil" | "round":
                return together(*(argument.way for argument in arguments))
            case "-" | ">" | ">=":
                return together(x.way, TURNED[y.way])
            case "<" | "<=":
                return together(TURNED[x.way], y.way)
            case "neg":
                return TURNED[x.way]
            case "*":
                # x'y' - xy = x'(y' - y) + y(x' - x): each term must keep its sign over the whole range.
                return together(scaled(y.way, x.range), scaled(x.way, y.range))
            case "/" | "//":
                over = reciprocal(y.range)
                return together(scaled(TURNED[y.way], x.range), scaled(x.way, over))
            case "and" | "or":
                return together(*(scaled(argument.way, argument.range) for argument in arguments))
            case "if":
                return self.choice(x, y, z)
        return "unknown"

    @staticmethod
    def choice(condition: Moving, then: Moving, other: Moving) -> Direction:
        """A condition that switches once moves from one branch to the other; that jump has a direction too."""
        ways = together(then.way, other.way)
        if condition.way == "constant":
            return ways
        turned_on = scaled(condition.way, condition.range)
        if turned_on not in ("up", "down"):
            return "unknown"
        before, after = (other, then) if turned_on == "up" else (then, other)
        if before.range.high <= after.range.low:
            return together(ways, "up")
        return together(ways, "down") if before.range.low >= after.range.high else "unknown"
