"""The fourth meaning of an expression: a Triton function, written from the tree, that a kernel calls.

As in ``runtime/quantities.py`` a value is an exact ratio of int64 numbers and is floored once, at the end. A kernel
takes the function as a constexpr, so that one kernel serves every policy and a constant budget costs nothing.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl

Tree = tuple[Any, ...]

_WRITTEN: dict[tuple[str, bool], Any] = {}


@triton.jit
def floor_div(a, b):
    """a / b rounded down, for b > 0: Triton's own ``//`` cuts towards 0."""
    quotient = a // b
    return quotient - (quotient * b > a).to(tl.int64)


@triton.jit
def signed(a, b):
    """``a`` with the sign of ``b``; 0 where ``b`` is 0."""
    return tl.where(b < 0, -a, tl.where(b > 0, a, 0))


def count_function(tree: Tree, places: Mapping[str, tuple[int, bool]]) -> Any:
    """``f(reads, row, cell)`` -> int64: the expression, floored.

    Args:
        places: where a name ("t", "size(prompt)") lies: its number in the tuple of pointers ``reads``, and whether
            there is one number for each KV head, at ``cell``, or one for each row, at ``row``.
    """
    writer = _Writer(places)
    numerator, denominator = writer.ratio(tree)
    return _function(writer.body(writer.floored(numerator, denominator)), "reads, row, cell")


def share_function(tree: Tree, places: Mapping[str, tuple[int, bool]]) -> Any:
    """``f(reads, row, cell, count)`` -> int64: ceil(share * count), exactly."""
    writer = _Writer(places)
    numerator, denominator = writer.ratio(tree)
    product = writer.keep(f"-({numerator} * count)")
    ceiling = writer.keep(f"-{writer.floored(product, denominator)}")
    return _function(writer.body(ceiling), "reads, row, cell, count")


def _function(body: Sequence[str], arguments: str) -> Any:
    """The compiled source as a Triton function; equal sources give one function, so that kernels compile once."""
    lines = "".join(f"    {line}\n" for line in body)
    name = "quantity_" + hashlib.sha256(lines.encode()).hexdigest()[:16]
    source = f"def {name}({arguments}):\n{lines}"
    key = (source, bool(triton.knobs.runtime.interpret))
    if key not in _WRITTEN:
        file = f"<{__name__} {name}>"
        # Triton reads a function's source again; this is where Python keeps sources that lie in no file.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        scope: dict[str, Any] = {"tl": tl, "floor_div": floor_div, "signed": signed, "__name__": __name__}
        exec(compile(source, file, "exec"), scope)
        _WRITTEN[key] = triton.jit(scope[name])
    return _WRITTEN[key]


@dataclass
class _Writer:
    """Writes one line for each step of a computation; a value is the name of a variable, and "1" is the number one."""

    places: Mapping[str, tuple[int, bool]]
    lines: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)

    def keep(self, expression: str) -> str:
        """The variable that holds an expression; the same expression is computed once."""
        if expression not in self.known:
            self.known[expression] = f"v{len(self.known)}"
            self.lines.append(f"{self.known[expression]} = {expression}")
        return self.known[expression]

    def body(self, result: str) -> list[str]:
        result = self.whole(result)
        return [*self.lines, f"return {result}"]

    def whole(self, value: str) -> str:
        """A variable of type int64, also for the number one."""
        return self.constant(1) if value == "1" else value

    def constant(self, number: int) -> str:
        return self.keep(f"tl.full((), {number}, tl.int64)")

    def ratio(self, tree: Tree) -> tuple[str, str]:
        """Numerator and denominator > 0 of an expression."""
        op = tree[0]
        if op == "const":
            return self.constant(tree[1]), "1" if tree[2] == 1 else self.constant(tree[2])
        if op == "name":
            return self.read(tree[1]), "1"
        if op in ("size", "seen"):
            return self.read(f"{op}({tree[1]})"), "1"
        return _OPERATIONS[op](self, *[self.ratio(argument) for argument in tree[1:]])

    def read(self, name: str) -> str:
        if name == "context" and name not in self.places:
            return self.keep(f"{self.read('prompt_len')} + {self.read('t')}")
        number, by_head = self.places[name]
        return self.keep(f"tl.load(reads[{number}] + {'cell' if by_head else 'row'})")

    def times(self, a: str, b: str) -> str:
        if a == "1" or b == "1":
            return b if a == "1" else a
        return self.keep(f"{a} * {b}")

    def floored(self, numerator: str, denominator: str) -> str:
        return numerator if denominator == "1" else self.keep(f"floor_div({numerator}, {denominator})")

    def truth(self, condition: str) -> tuple[str, str]:
        return self.keep(f"({condition}).to(tl.int64)"), "1"

    def choose(self, condition: str, a: tuple[str, str], b: tuple[str, str]) -> tuple[str, str]:
        def pick(x: str, y: str) -> str:
            return x if x == y else self.keep(f"tl.where({condition}, {self.whole(x)}, {self.whole(y)})")

        return pick(a[0], b[0]), pick(a[1], b[1])


_Ratio = tuple[str, str]


def _add(w: _Writer, a: _Ratio, b: _Ratio, sign: str = "+") -> _Ratio:
    return w.keep(f"{w.times(a[0], b[1])} {sign} {w.times(b[0], a[1])}"), w.times(a[1], b[1])


def _divide(w: _Writer, a: _Ratio, b: _Ratio) -> _Ratio:
    numerator, denominator = w.times(a[0], b[1]), w.times(b[0], a[1])
    return w.keep(f"signed({numerator}, {denominator})"), w.keep(f"tl.abs({denominator})")


def _less(w: _Writer, a: _Ratio, b: _Ratio) -> str:
    return f"{w.times(a[0], b[1])} < {w.times(b[0], a[1])}"


def _floor(w: _Writer, a: _Ratio) -> _Ratio:
    return w.floored(*a), "1"


def _negate(w: _Writer, a: _Ratio) -> _Ratio:
    return w.keep(f"-{a[0]}"), a[1]


def _minimum(w: _Writer, *ratios: _Ratio) -> _Ratio:
    least = ratios[0]
    for other in ratios[1:]:
        least = w.choose(_less(w, other, least), other, least)
    return least


def _maximum(w: _Writer, *ratios: _Ratio) -> _Ratio:
    most = ratios[0]
    for other in ratios[1:]:
        most = w.choose(_less(w, most, other), other, most)
    return most


_OPERATIONS: dict[str, Callable[..., _Ratio]] = {
    "+": _add,
    "-": lambda w, a, b: _add(w, a, b, "-"),
    "neg": _negate,
    "*": lambda w, a, b: (w.times(a[0], b[0]), w.times(a[1], b[1])),
    "/": _divide,
    "//": lambda w, a, b: _floor(w, _divide(w, a, b)),
    "<": lambda w, a, b: w.truth(_less(w, a, b)),
    ">": lambda w, a, b: w.truth(_less(w, b, a)),
    "<=": lambda w, a, b: w.truth(f"{w.times(a[0], b[1])} <= {w.times(b[0], a[1])}"),
    ">=": lambda w, a, b: w.truth(f"{w.times(a[0], b[1])} >= {w.times(b[0], a[1])}"),
    "==": lambda w, a, b: w.truth(f"{w.times(a[0], b[1])} == {w.times(b[0], a[1])}"),
    "and": lambda w, a, b: w.truth(f"({a[0]} != 0) & ({b[0]} != 0)"),
    "or": lambda w, a, b: w.truth(f"({a[0]} != 0) | ({b[0]} != 0)"),
    "if": lambda w, condition, a, b: w.choose(f"{condition[0]} != 0", a, b),
    "min": _minimum,
    "max": _maximum,
    "clamp": lambda w, a, low, high: _minimum(w, _maximum(w, a, low), high),
    "floor": _floor,
    "ceil": lambda w, a: _negate(w, _floor(w, _negate(w, a))),
    "round": lambda w, a: _floor(w, _add(w, a, (w.constant(1), w.constant(2)))),
}
