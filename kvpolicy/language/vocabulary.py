"""The words that expressions are made of: built-in names, functions, and what is known about them beforehand."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

PLAN_NAMES = ("layer", "layers", "max_new_tokens")
"""Names with a value when a plan is made; the others may differ by row and step."""

ROW_NAMES = ("prompt_len", "t", "context")
"""Names with a value per row and pass, read after the pass's tokens were admitted."""

POOL_FUNCTIONS = ("size", "seen")
"""`size(pool)`, `seen(pool)`: functions of a pool's name, which behave like names."""

BUILTIN_NAMES = PLAN_NAMES + ROW_NAMES

ARITY: dict[str, tuple[int, int | None]] = {
    "if": (3, 3),
    "min": (2, None),
    "max": (2, None),
    "clamp": (3, 3),
    "floor": (1, 1),
    "ceil": (1, 1),
    "round": (1, 1),
    "cos": (1, 1),
}
"""Functions, with the least and the most arguments they take."""

RESERVED = frozenset(BUILTIN_NAMES) | frozenset(POOL_FUNCTIONS) | frozenset(ARITY) | {"and", "or", "not"}
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
