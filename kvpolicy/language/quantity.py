"""Quantities: numbers that a policy writes as expressions.

One parsed expression is evaluated exactly on the host, bounded by interval arithmetic when a plan is made, and turned
into tensor operations by the runtime, which gives `walk` an algebra of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from kvpolicy.language.algebra import Exact, Render, constant, fold, walk
from kvpolicy.language.interval import Direction, Interval, Monotone, Range
from kvpolicy.language.syntax import QuantityError, Tree, nodes, parse
from kvpolicy.language.vocabulary import POOL_FUNCTIONS

__all__ = ["Quantity", "QuantityError", "Range"]


@dataclass(frozen=True)
class Quantity:
    """An expression: its tree of nested tuples (see syntax.py), and a text that reads as that tree.

    Two quantities are equal when their trees are, whatever their texts.
    """

    tree: Tree
    text: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.text:
            object.__setattr__(self, "text", self.canonical)

    @classmethod
    def parse(cls, text: str) -> Quantity:
        """Read an expression; its constants are computed, its text is kept. Raises QuantityError."""
        return cls(fold(parse(text).tree, {}), text.strip())

    @classmethod
    def number(cls, value: int | Fraction, share: bool = False) -> Quantity:
        """A constant."""
        return cls(constant(Fraction(value), share))

    @cached_property
    def names(self) -> frozenset[str]:
        """Free names; those of pools are spelled "size(prompt)", "seen(prompt)"."""
        found = set()
        for node, _ in nodes(self.tree):
            if node[0] == "name":
                found.add(node[1])
            elif node[0] in POOL_FUNCTIONS:
                found.add(f"{node[0]}({node[1]})")
        return frozenset(found)

    @cached_property
    def constant(self) -> Fraction | None:
        """The value, where no name is free."""
        return Fraction(self.tree[1], self.tree[2]) if self.tree[0] == "const" else None

    @property
    def canonical(self) -> str:
        """The tree as text: the same for every way to write it."""
        return walk(self.tree, Render())[0]

    @property
    def share(self) -> bool:
        """Whether this is a bare share such as `50%`: a fraction of something that is not named."""
        return self.tree[0] == "const" and bool(self.tree[3])

    def fold(self, values: Mapping[str, int | Fraction | Quantity]) -> Quantity:
        """Put values in for names and compute what is then constant. Raises QuantityError, as for a division by 0."""
        known = {name: value for name, value in values.items() if name in self.names}
        trees = {name: v.tree if isinstance(v, Quantity) else constant(Fraction(v)) for name, v in known.items()}
        tree = fold(self.tree, trees)
        return self if tree == self.tree else Quantity(tree)

    def evaluate(self, values: Mapping[str, int | Fraction]) -> Fraction:
        """The exact value; whoever counts tokens floors it. Raises QuantityError without a value for every name."""
        return walk(self.tree, Exact({name: Fraction(value) for name, value in values.items() if name in self.names}))

    def bound(self, ranges: Mapping[str, Range]) -> Range:
        """A range that holds every value, given ranges of the names; a name without one is any number from 0 up.

        Raises QuantityError where a divisor may be 0.
        """
        return walk(self.tree, Interval(ranges))

    def direction(
        self, names: Collection[str] = ("t", "context"), ranges: Mapping[str, Range] | None = None
    ) -> Direction:
        """How the value moves when `names` grow by steps of one together and every other name stands still.

        `ranges` (default: any number from 0 up) only sharpens the answer; "unknown" is always a possible one.
        """
        try:
            return walk(self.tree, Monotone(names, Interval(ranges or {}))).way
        except QuantityError:  # a divisor that may be 0: whoever bounds the quantity says so
            return "unknown"

    def __str__(self) -> str:
        return self.text
