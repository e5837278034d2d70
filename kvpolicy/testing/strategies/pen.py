"""The hand that draws: choices that shrink towards the first, numbers as a policy may spell them, expressions.

What it draws is meant to be valid as it stands, so that hardly a draw is thrown away, and simple choices come first, so
that a failure shrinks to a policy that a person would write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

Source = Callable[[int, int], int]
"""A whole number between two, both included: all that is ever drawn."""


@dataclass
class Pen:
    """Draws the parts of one policy; ``params`` and ``let`` collect the names that its quantities use.

    ``runs`` says whether a small policy may be drawn from (see support.py); for the whole language it always does.
    """

    source: Source
    runs: Callable[[dict[str, Any]], bool] = lambda document: True
    params: dict[str, dict[str, Any]] = field(default_factory=dict)
    let: dict[str, str] = field(default_factory=dict)

    def number(self, low: int, high: int) -> int:
        """A whole number, both ends included; the lowest is the simplest."""
        return self.source(low, high)

    def chance(self, one_in: int) -> bool:
        """True once in so many draws; False is simpler."""
        return self.number(0, one_in - 1) == one_in - 1

    def pick(self, choices: Sequence[T]) -> T:
        """One of these; the first is the simplest."""
        return choices[self.number(0, len(choices) - 1)]

    def known(self, value: int | str) -> str:
        """A number that must be known when the plan is made, in one of its spellings."""
        form = self.number(0, 9)
        if form == 7:
            return self.param(str(value))
        if form == 8:
            return self.name(f"{value} + 0 * layers")
        if form == 9:
            ways = ("floor({} + 50%)", "{} + 0 * layer", "round({} - 0.25)", "({} * 4k) / 4k", "ceil(({}) / 1)")
            return self.pick(ways[: None if isinstance(value, int) else 0] or ("({}) / 1",)).format(value)
        return str(value)

    def param(self, default: str) -> str:
        """A new param's name."""
        name = f"p{len(self.params)}"
        self.params[name] = {"default": default, "help": "drawn"}
        if self.chance(6):
            self.params[name]["value"] = default
        return name

    def name(self, expression: str) -> str:
        """A new `let` name for an expression."""
        name = f"n{len(self.let)}"
        self.let[name] = expression
        return name

    def planned(self, low: int, high: int) -> str:
        """A quantity from ``low`` to ``high`` that may differ by layer and nothing else."""
        a, b = self.number(low, high), self.number(low, high)
        least, most = min(a, b), max(a, b)
        form = self.number(0, 7)
        if form == 5:
            return f"min({most}, {least} + layer)"
        if form == 6:
            return f"clamp({most} - layer * layers, {least}, {most})"
        if form == 7:
            return f"{least} + round({most - least} * (1 + cos(layer)) / 2)"
        return self.known(a)

    # Quantities that may differ by row and step --------------------------------------------------------------------

    def budget(self, least: int, others: Sequence[str], pools: Sequence[str]) -> str:
        """Tokens that may stay. A plain number is at least ``least``; ``others`` are pools whose size may be asked."""
        a, b = self.number(1, 8), self.number(0, 12)
        form = self.number(0, 11)
        if form <= 3:
            return self.known(least + b)
        some = self.expression(others, pools, 2)
        if form == 4:
            share = self.pick(("50%", "25%", "1/3", "0.7", "12.5%"))
            return f"{a} + {share} * {self.pick(('prompt_len', 'context', 't'))}"
        if form == 5:
            return f"max({a}, {least + b} - t // {self.number(1, 4)})"
        if form == 6:
            return f"{least} + t // {self.number(1, 4)}"
        if form == 7:
            return f"if({self.condition(others, pools)}, {a}, {a + b})"
        if form == 8:
            return f"{24 + b} - ({some})"
        if form == 9:
            return f"max({a}, {some})"
        if form == 10 and others:
            return f"max({a}, {12 + b} - size({self.pick(others)}))"
        return f"clamp({some}, {a}, {a + b})"

    def reach(self, others: Sequence[str], pools: Sequence[str]) -> tuple[str, int]:
        """A window or a number of first tokens, and its value where it is a plain number (0 where it is none)."""
        if self.number(0, 3) < 3:
            count = self.number(0, 6)
            return self.known(count), count
        form = self.number(0, 2)
        if form == 0:
            return f"min({self.number(1, 8)}, t // {self.number(1, 3)})", 0
        if form == 1:
            return f"max(0, {self.number(1, 8)} - t)", 0
        return f"clamp({self.expression(others, pools, 1)}, 0, {self.number(1, 8)})", 0

    def share(self, others: Sequence[str], pools: Sequence[str]) -> str:
        """A share of units, from 0 to 1."""
        form = self.number(0, 9)
        if form <= 6:
            return self.pick(("50%", "1/3", "25%", "10%", "100%", "0.6", "0"))
        if form == 7:
            return self.param(self.pick(("50%", "20%")))
        if form == 8:
            return f"min(1, t / {self.number(8, 30)})"
        return f"1 / max(1, {self.expression(others, pools, 1)})"

    def condition(self, others: Sequence[str], pools: Sequence[str]) -> str:
        """A comparison, or two."""
        sign = self.pick(("<", ">=", ">", "<=", "=="))
        one = f"{self.atom(others, pools)} {sign} {self.expression(others, pools, 0)}"
        form = self.number(0, 4)
        if form < 3:
            return one
        return f"{one} {self.pick(('and', 'or'))} {self.atom(others, pools)} > {self.number(0, 9)}"

    def expression(self, others: Sequence[str], pools: Sequence[str], depth: int) -> str:
        """Any expression; it may be negative, and nothing in it is ever divided by 0."""
        form = self.number(0, 15) if depth else 0
        if form <= 3:
            return self.atom(others, pools)

        def part() -> str:
            return self.expression(others, pools, depth - 1)

        if form <= 6:
            return f"{part()} {self.pick(('+', '-'))} {part()}"
        if form == 7:
            return f"{self.pick(('min', 'max'))}({part()}, {part()})"
        if form == 8:
            return f"({part()}) {self.pick(('//', '/'))} {self.number(1, 5)}"
        if form == 9:
            return f"({part()}) * {self.pick(('2', '50%', '-1', '1.5'))}"
        if form == 10:
            return f"{self.pick(('floor', 'ceil', 'round'))}(({part()}) / {self.number(2, 4)})"
        if form == 11:
            return f"({part()}) {self.pick(('//', '/'))} max(1, {part()})"
        if form == 12:
            return f"if({self.condition(others, pools)}, {part()}, {part()})"
        if form == 13:
            return f"clamp({part()}, {self.number(0, 3)}, {self.number(3, 12)})"
        if form == 14:
            return f"-({part()})"
        return self.name(part())

    def atom(self, others: Sequence[str], pools: Sequence[str]) -> str:
        """A number or a name."""
        form = self.number(0, 10)
        if form <= 2:
            return str(self.number(0, 9))
        if form == 7 and others:
            return f"size({self.pick(others)})"
        if form == 8:
            return f"seen({self.pick(pools)})"
        if form == 9:
            return self.param(str(self.number(0, 9)))
        if form == 10:
            return self.pick(("layer", "layers", "max_new_tokens", "cos(layer)", "50%"))
        return self.pick(("t", "prompt_len", "context", "t"))
