"""Patterns and claims as Markdown, read off their functions and classes; each pattern is drawn as it really attends."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvpolicy.language import load_policy
from kvpolicy.language.nodes import typed
from kvpolicy.language.reader import read
from kvpolicy.testing.arguments import IMPLIED
from kvpolicy.testing.claims import CLAIMS, Claim
from kvpolicy.testing.feeding import plan_for
from kvpolicy.testing.full_cache import FullCache
from kvpolicy.testing.patterns import PATTERNS, synthesize
from kvpolicy.testing.patterns.generators import EXAMPLES
from kvpolicy.testing.patterns.mixture import Where
from kvpolicy.testing.patterns.shape import Shape
from kvpolicy.testing.traces import replay

KINDS = {
    "Tokens": "positions",
    "Moments": "positions",
    "Which": "positions, `prompt`, `all`, `window`",
    "Numbers": "a number or a list",
    "Places": "numbers, as in `0..3`",
    "Quantity": "an expression",
    "Share": "`0.9`, `90%`",
    "Parts": "a list of patterns",
    "Turns": "a list of `{after: …, prompt: …}`",
    "int": "a whole number",
    "float": "a number",
    "str": "a name or path",
}
"""How an argument is written, by its annotation."""

TEXT = {"prompt": 8, "steps": 24, "noise": 0, "layers": 1, "heads": 1, "kv_heads": 1}
"""What the pictures are of."""

EVERY = 3
"""Queries from one line of a picture to the next."""

SHADES = ((2.5, "█"), (1.2, "▓"), (0.6, "▒"), (0.2, "░"), (0.0, "·"))
"""Shares from so many times the even one."""


def render_patterns() -> str:
    """What all patterns share, and then each of them."""
    parts = ["| argument | written as | default |", "| --- | --- | --- |"]
    parts += _rows(Shape)
    for name, draw in PATTERNS.items():
        example = f"{{pattern: {name}{', ' if EXAMPLES[name] else ''}{EXAMPLES[name]}}}"
        parts += ["", f"### {name}", "", _told(draw.__doc__), "", f"`{example}`", ""]
        parts += ["```text", *picture(example), "```"]
        rows = list(_rows(draw))
        parts += ["", "| argument | written as | default |", "| --- | --- | --- |", *rows] if rows else []
        if name == "mixture":
            parts += ["", "| key of `where` | written as | default |", "| --- | --- | --- |", *_rows(Where)]
    return "\n".join(parts)


def render_claims() -> str:
    """What all claims share, and then each of them."""
    parts = ["| argument of every claim | written as | default |", "| --- | --- | --- |"]
    shared = {field.name for field in dataclasses.fields(Claim)}
    parts += _rows(Claim)
    for name, kind in sorted(CLAIMS.items()):
        rows = [line for line in _rows(kind) if line.split("`")[1] not in shared]
        parts += ["", f"### {name}", "", _told(kind.__doc__), "", f"`{{{name}: …}}` alone gives `{kind.MAIN}`.", ""]
        parts += ["| argument | written as | default |", "| --- | --- | --- |", *rows]
    return "\n".join(parts)


def render_traces() -> str:
    """The arguments of a trace."""
    return "\n".join(["| argument | written as | default |", "| --- | --- | --- |", *_rows(replay)])


def picture(example: str) -> Iterator[str]:
    """A few queries of a short text as lines: how much each looks at the tokens before it.

    What works against a policy works against a window of 8 tokens here.
    """
    policy = load_policy("window", set={"window": 8})
    arguments = typed(read(example, "example").data())
    full = FullCache(synthesize({**TEXT, **arguments}, lambda said: plan_for(policy, said)))
    length = TEXT["prompt"] + TEXT["steps"]
    yield "token      " + "".join(f"{at:<8}" for at in range(0, length, 8)).rstrip()
    for newest in range(EVERY - 1, length, EVERY):
        shares = full.probabilities(0, 0, 0, newest) * (newest + 1)
        yield f"query {newest:>3}  " + "".join(shade(float(share)) for share in np.round(shares, 3))


def shade(share: float) -> str:
    return next(letter for least, letter in SHADES if share >= least)


def _rows(function: Any) -> Iterator[str]:
    """One for each argument."""
    for name, at in inspect.signature(function).parameters.items():
        if name in IMPLIED:
            continue
        written = KINDS[str(at.annotation).removesuffix(" | None")]
        yield f"| `{name.removesuffix('_')}` | {written} | {_default(at)} |"


def _default(at: inspect.Parameter) -> str:
    if at.default is at.empty:
        return "required"
    if at.default is None or at.default == ():
        return ""
    value = at.default[0] if isinstance(at.default, tuple) and len(at.default) == 1 else at.default
    return f"`{value:g}`" if isinstance(value, int | float) else f"`{value}`"


def _told(text: str | None) -> str:
    """A docstring as paragraphs of Markdown."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()).replace("``", "`") for paragraph in paragraphs)
