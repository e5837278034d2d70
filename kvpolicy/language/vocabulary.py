"""The words that expressions are made of, what they mean, and what is known about them beforehand."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple

PLAN_NAMES = {
    "layer": "the layer's number, from 0, among those the policy governs",
    "layers": "how many layers the policy governs",
    "max_new_tokens": "the most tokens that will be generated",
}
"""Names with a value when a plan is made; the others may differ by row and step."""

ROW_NAMES = {
    "prompt_len": "prompt tokens of this row, padding not counted",
    "t": "the clock: tokens generated in this row so far",
    "context": "`prompt_len + t`",
}
"""Names with a value per row and pass, read after the pass's tokens were admitted."""

POOL_FUNCTIONS = {
    "size": "tokens that stayed at the pool's last update, whole pages",
    "seen": "tokens that the pool ever admitted",
}
"""`size(pool)`, `seen(pool)`: functions of a pool's name, which behave like names."""

BUILTIN_NAMES = (*PLAN_NAMES, *ROW_NAMES)


class Function(NamedTuple):
    """How many arguments a function takes, and what it gives."""

    least: int
    most: int | None
    meaning: str


FUNCTIONS = {
    "if": Function(3, 3, "the second argument where the first is not 0, else the third"),
    "min": Function(2, None, "the least"),
    "max": Function(2, None, "the largest"),
    "clamp": Function(3, 3, "the first, held between the second and the third"),
    "floor": Function(1, 1, "rounded down"),
    "ceil": Function(1, 1, "rounded up"),
    "round": Function(1, 1, "rounded to the nearest, half up"),
    "cos": Function(1, 1, "cosine of radians, to 6 decimals; known when the plan is made"),
}

RESERVED = frozenset(BUILTIN_NAMES) | frozenset(POOL_FUNCTIONS) | frozenset(FUNCTIONS) | {"and", "or", "not"}
"""Words that a param or a `let` name may not hide."""

AT_LEAST = {"layers": 1, "max_new_tokens": 1}
"""Least values of built-in names; every other one, `size()` and `seen()` included, starts at 0."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint with the nearest right spelling of `word`, or with all of them when none is near."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"known here: {', '.join(f'`{name}`' for name in names)}" if names else ""
