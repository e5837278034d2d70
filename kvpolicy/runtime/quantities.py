"""The third meaning of an expression: exact integer arithmetic on tensors, one value per row (and KV head).

A value is a ratio (numerator, denominator > 0) of integers or int64 tensors; nothing is rounded before the end. What is
a plain number stays one, so a constant budget costs no operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Whole = int | Tensor
Ratio = tuple[Whole, Whole]
Tree = tuple  # nested tuples only, see language/quantity.py: the compiler can treat them as constants


def floored(tree: Tree, values: Mapping[str, Whole]) -> Whole:
    """Evaluate an expression tree and floor it once, at the end.

    ``values`` maps "t", "prompt_len", "context", "size(pool)" and "seen(pool)" to int64 tensors that broadcast.
    """
    numerator, denominator = evaluate(tree, values)
    return numerator if _is_one(denominator) else numerator // denominator


def share_of(tree: Tree, count: Tensor, values: Mapping[str, Whole]) -> Tensor:
    """ceil(share * count), exactly, where the share may itself vary: how many of ``count`` units a share names."""
    numerator, denominator = evaluate(tree, values)
    return -((-numerator * count) // denominator)


def evaluate(tree: Tree, values: Mapping[str, Whole]) -> Ratio:
    """The exact ratio an expression stands for."""
    op = tree[0]
    if op == "const":
        return tree[1], tree[2]
    if op == "name":
        return values[tree[1]], 1
    if op in ("size", "seen"):
        return values[f"{op}({tree[1]})"], 1
    return OPERATIONS[op](*[evaluate(argument, values) for argument in tree[1:]])


def _is_one(number: Whole) -> bool:
    return isinstance(number, int) and number == 1


def _times(a: Whole, b: Whole) -> Whole:
    """A product that costs nothing where one factor is 1, as most denominators are."""
    if _is_one(a):
        return b
    return a if _is_one(b) else a * b


def _add(a: Ratio, b: Ratio) -> Ratio:
    return _times(a[0], b[1]) + _times(b[0], a[1]), _times(a[1], b[1])


def _subtract(a: Ratio, b: Ratio) -> Ratio:
    return _times(a[0], b[1]) - _times(b[0], a[1]), _times(a[1], b[1])


def _negate(a: Ratio) -> Ratio:
    return -a[0], a[1]


def _multiply(a: Ratio, b: Ratio) -> Ratio:
    return _times(a[0], b[0]), _times(a[1], b[1])


def _divide(a: Ratio, b: Ratio) -> Ratio:
    numerator, denominator = _times(a[0], b[1]), _times(a[1], b[0])
    if isinstance(denominator, int):
        return (numerator, denominator) if denominator > 0 else (-numerator, -denominator)
    return numerator * denominator.sign(), denominator.abs()


def _floor(a: Ratio) -> Ratio:
    return (a[0] if _is_one(a[1]) else a[0] // a[1]), 1


def _less(a: Ratio, b: Ratio) -> Tensor | bool:
    return _times(a[0], b[1]) < _times(b[0], a[1])


def _truth(condition: Tensor | bool) -> Ratio:
    return (condition.to(torch.int64) if isinstance(condition, Tensor) else int(condition)), 1


def _choose(condition: Tensor | bool, a: Ratio, b: Ratio) -> Ratio:
    if not isinstance(condition, Tensor):
        return a if condition else b
    return _pick(condition, a[0], b[0]), _pick(condition, a[1], b[1])


def _pick(condition: Tensor, a: Whole, b: Whole) -> Whole:
    if isinstance(a, int) and isinstance(b, int) and a == b:
        return a
    return torch.where(condition, a, b)


def _minimum(*ratios: Ratio) -> Ratio:
    least = ratios[0]
    for other in ratios[1:]:
        least = _clamped(least, other, "max") or _choose(_less(other, least), other, least)
    return least


def _maximum(*ratios: Ratio) -> Ratio:
    most = ratios[0]
    for other in ratios[1:]:
        most = _clamped(most, other, "min") or _choose(_less(most, other), other, most)
    return most


def _clamped(a: Ratio, b: Ratio, side: str) -> Ratio | None:
    """The same in one operation, where a whole tensor is held against a whole number."""
    if not (_is_one(a[1]) and _is_one(b[1])):
        return None
    for tensor, number in ((a[0], b[0]), (b[0], a[0])):
        if isinstance(tensor, Tensor) and isinstance(number, int):
            return tensor.clamp(**{side: number}), 1
    return None


def _not_zero(a: Ratio) -> Tensor | bool:
    return a[0] != 0


def _both(a: Ratio, b: Ratio) -> Ratio:
    return _multiply(_truth(_not_zero(a)), _truth(_not_zero(b)))


OPERATIONS: dict[str, Callable[..., Ratio]] = {
    "+": _add,
    "-": _subtract,
    "neg": _negate,
    "*": _multiply,
    "/": _divide,
    "//": lambda a, b: _floor(_divide(a, b)),
    "<": lambda a, b: _truth(_less(a, b)),
    ">": lambda a, b: _truth(_less(b, a)),
    "<=": lambda a, b: _add((1, 1), _negate(_truth(_less(b, a)))),
    ">=": lambda a, b: _add((1, 1), _negate(_truth(_less(a, b)))),
    "==": lambda a, b: _truth(a[0] * b[1] == b[0] * a[1]),
    "and": _both,
    "or": lambda a, b: _truth(_not_zero(_add(_truth(_not_zero(a)), _truth(_not_zero(b))))),
    "if": lambda condition, a, b: _choose(_not_zero(condition), a, b),
    "min": _minimum,
    "max": _maximum,
    "clamp": lambda a, low, high: _minimum(_maximum(a, low), high),
    "floor": _floor,
    "ceil": lambda a: _negate(_floor(_negate(a))),
    "round": lambda a: _floor(_add(a, (1, 2))),
}
