"""One walker over expression trees, and the meanings it can give them.

An `Algebra` says what a constant, a name and an operation are worth; `walk` does the rest. Numbers (`Exact`), trees
again (`Fold`), intervals (`Interval`) and text (`Render`) live here; direction.py adds monotonicity, and the runtime
adds tensors. Every algebra is strict: all arguments of `if`, `and` and `or` are evaluated, as tensors do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, TypeVar

from kvpolicy.language.syntax import COMPARISONS, LEVEL, LIMIT, MAX_DEPTH, QuantityError, Tree, nodes, too_large

V = TypeVar("V")
MAX_NODES = 5000
HALF = Fraction(1, 2)
NEVER_ZERO = "keep the divisor above 0, as in `max(1, …)`"


class Algebra(Protocol[V]):
    """What trees are worth in one world."""

    def const(self, value: Fraction, share: bool) -> V: ...

    def name(self, name: str) -> V:
        """The worth of a free name: "t", "size(prompt)"."""
        ...

    def apply(self, operation: str, arguments: Sequence[V]) -> V: ...


def walk(tree: Tree, algebra: Algebra[V]) -> V:
    """Evaluate a tree bottom-up, left to right."""
    match tree:
        case ("const", numerator, denominator, share):
            return algebra.const(Fraction(numerator, denominator), share)
        case ("name", name):
            return algebra.name(name)
        case ("size" | "seen" as function, pool):
            return algebra.name(f"{function}({pool})")
        case (operation, *arguments):
            return algebra.apply(operation, [walk(argument, algebra) for argument in arguments])
    raise AssertionError(f"not a tree: {tree!r}")


def leaf(name: str) -> Tree:
    """The tree of a free name: "t" or "size(prompt)"."""
    function, bracket, pool = name.partition("(")
    return (function, pool[:-1]) if bracket else ("name", name)


def constant(value: Fraction, share: bool = False) -> Tree:
    """The tree of a number."""
    if max(abs(value.numerator), value.denominator) > LIMIT:
        raise too_large("the result")
    return ("const", value.numerator, value.denominator, share)


# Numbers ---------------------------------------------------------------------------------------------------------


def compute(operation: str, arguments: Sequence[Fraction]) -> Fraction:
    """One operation on exact numbers. Comparisons and logic give 1 or 0; cos is rounded to 6 decimals."""
    x, y, z = (*arguments, Fraction(0), Fraction(0), Fraction(0))[:3]
    match operation:
        case "+":
            return x + y
        case "-":
            return x - y
        case "*":
            return x * y
        case "/" | "//":
            if y == 0:
                raise QuantityError("this divides by 0", hint=NEVER_ZERO)
            return x / y if operation == "/" else Fraction(x // y)
        case "neg":
            return -x
        case "if":
            return y if x != 0 else z
        case "min":
            return min(arguments)
        case "max":
            return max(arguments)
        case "clamp":
            return min(max(x, y), z)
        case "floor":
            return Fraction(math.floor(x))
        case "ceil":
            return Fraction(math.ceil(x))
        case "round":
            return Fraction(math.floor(x + HALF))
        case "cos":
            return Fraction(round(math.cos(float(x)) * 10**6), 10**6)
    return Fraction(int(holds(operation, x, y)))


def holds(operation: str, x: Fraction, y: Fraction) -> bool:
    """Comparisons and logic."""
    match operation:
        case "<":
            return x < y
        case "<=":
            return x <= y
        case ">":
            return x > y
        case ">=":
            return x >= y
        case "==":
            return x == y
        case "and":
            return x != 0 and y != 0
        case "or":
            return x != 0 or y != 0
    raise AssertionError(f"not an operation: {operation}")


@dataclass(frozen=True)
class Exact:
    """Numbers: the value of a tree, given the values of all its names."""

    values: Mapping[str, Fraction]

    def const(self, value: Fraction, share: bool) -> Fraction:
        return value

    def name(self, name: str) -> Fraction:
        try:
            return Fraction(self.values[name])
        except KeyError:
            raise QuantityError(f"`{name}` has no value here") from None

    def apply(self, operation: str, arguments: Sequence[Fraction]) -> Fraction:
        result = compute(operation, arguments)
        if max(abs(result.numerator), result.denominator) > LIMIT:
            raise too_large("the result")
        return result


# Trees -----------------------------------------------------------------------------------------------------------

SHARES_ALL = frozenset({"+", "-", "*", "neg", "min", "max", "clamp", "floor", "ceil", "round"})
"""Operations that give a share when every argument is one (`x / 3` does when x is one)."""


@dataclass
class Fold:
    """Trees again, with known names put in and constants computed. Counts nodes, so that `let` cannot multiply them."""

    trees: Mapping[str, Tree]
    nodes: int = 0

    def const(self, value: Fraction, share: bool) -> Tree:
        self.count(1)
        return constant(value, share)

    def name(self, name: str) -> Tree:
        tree = self.trees.get(name)
        self.count(1 if tree is None else sum(1 for _ in nodes(tree)))
        return leaf(name) if tree is None else tree

    def apply(self, operation: str, arguments: Sequence[Tree]) -> Tree:
        self.count(1)
        if operation == "if" and arguments[0][0] == "const":
            return arguments[1] if arguments[0][1] != 0 else arguments[2]
        if any(argument[0] != "const" for argument in arguments):
            return (operation, *arguments)
        shares = [argument[3] for argument in arguments]
        share = all(shares) if operation in SHARES_ALL else operation in ("/", "//") and shares == [True, False]
        return constant(compute(operation, [Fraction(a[1], a[2]) for a in arguments]), share)

    def count(self, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise QuantityError(f"written out, this has more than {MAX_NODES} parts", hint="a `let` multiplies itself")


def fold(tree: Tree, trees: Mapping[str, Tree]) -> Tree:
    """Put trees in for names, then compute what is constant. Raises QuantityError where that grows without bound."""
    folded = walk(tree, Fold(trees))
    if max(level for _, level in nodes(folded)) > MAX_DEPTH:
        raise QuantityError(f"written out, more than {MAX_DEPTH} operations hang on each other", hint="simplify it")
    return folded


# Text ------------------------------------------------------------------------------------------------------------


class Render:
    """Text that parses and folds to the same tree; the worth of a node is (text, binding level)."""

    def const(self, value: Fraction, share: bool) -> tuple[str, int]:
        number, suffix = (value * 100, "%") if share else (value, "")
        text, rest = decimal(number)
        if rest != 1:
            return f"{text}{suffix} / {rest}", LEVEL["/"]
        return f"{text}{suffix}", 6 if number < 0 else 7

    def name(self, name: str) -> tuple[str, int]:
        return name, 7

    def apply(self, operation: str, arguments: Sequence[tuple[str, int]]) -> tuple[str, int]:
        level = LEVEL.get(operation)
        if operation == "neg":
            return "-" + enclose(arguments[0], 6), 6
        if level is None:
            return f"{operation}({', '.join(text for text, _ in arguments)})", 7
        left, right = arguments
        return f"{enclose(left, level + (operation in COMPARISONS))} {operation} {enclose(right, level + 1)}", level


def enclose(operand: tuple[str, int], least: int) -> str:
    """The operand's text, in brackets if it binds less tightly than `least`."""
    text, level = operand
    return text if level >= least else f"({text})"


def decimal(value: Fraction) -> tuple[str, int]:
    """A number as decimal text and the divisor that no decimal can express: 1/6 -> ("0.5", 3)."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    value *= rest
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    digits = f"{abs(value.numerator * 10**places // value.denominator):0{places + 1}d}"
    text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    return ("-" if value < 0 else "") + text, rest
