"""What is said: patterns of ``kvpolicy.testing.patterns`` with drawn arguments, in ragged rows, turns and chunks."""

from __future__ import annotations

import inspect
from typing import Any

from kvpolicy.testing.patterns import PATTERNS
from kvpolicy.testing.strategies.pen import Pen, Source

Text = dict[str, Any]

DRAWN = ("Tokens", "int", "float")
"""Kinds of arguments that are drawn; a pattern that needs others is left out."""


def draw_text(source: Source, *, longest: int = 24) -> Text:
    """The `attention:` mapping of a test: a few rows of at most ``longest`` prompt tokens, as many generated ones."""
    pen = Pen(source)
    rows = pen.pick((1, 2, 1, 3))
    prompts = [pen.number(1, longest) for _ in range(rows)] if pen.number(0, 15) < 15 else [0] * (rows - 1) + [3]
    steps = pen.number(1, longest)
    text: Text = {"pattern": "uniform", "prompt": prompts[0] if rows == 1 else prompts, "steps": steps}
    kv_heads, group = pen.number(1, 2), pen.number(1, 2)
    text |= {"layers": pen.number(1, 2), "kv_heads": kv_heads, "heads": kv_heads * group}
    if pen.chance(4):
        text["chunk"] = pen.number(1, 9)
    if pen.chance(4):
        turns = []
        for _ in range(pen.number(1, 2)):
            after = pen.number(0, steps // 2)
            brought = [pen.number(0, 7) for _ in range(rows - 1)]
            turns.append({"after": after, "prompt": [1 + pen.number(0, 6), *brought] if rows > 1 else pen.number(1, 7)})
        text["turns"] = turns
    for flag in ("special", "images"):
        if pen.chance(4) and max(prompts) > 0:
            text[flag] = sorted({pen.number(0, max(prompts) - 1) for _ in range(pen.number(1, max(prompts)))})
    text |= pattern(pen, min(prompts) + steps, kv_heads * group)
    text["seed"] = pen.number(0, 2**16)
    return text


def pattern(pen: Pen, length: int, heads: int) -> Text:
    """Random smooth numbers, tied ones, or a named pattern with drawn arguments."""
    form = pen.number(0, 5)
    if form <= 1:
        return {"pattern": "uniform", "noise": pen.pick((2.0, 4.0, 1.0))}
    if form == 2:
        return {"pattern": "ties", "kinds": pen.number(1, 4)}
    names = [name for name in PATTERNS if drawable(name)]
    name = pen.pick(names)
    text: Text = {"pattern": name, **arguments(pen, name, length)}
    if pen.chance(4) and heads > 1:
        text["seen_by"] = [0]
    if pen.chance(4):
        text["noise"] = pen.pick((1.0, 0.0))
    return text


def drawable(name: str) -> bool:
    parameters = list(inspect.signature(PATTERNS[name]).parameters.values())[1:]
    return all(at.annotation in DRAWN or at.default is not at.empty for at in parameters)


def arguments(pen: Pen, name: str, length: int) -> Text:
    """Arguments by their kind. A moment comes after the tokens it is about, a number after one does not exceed it."""
    text: Text = {}
    last, most, largest = 0, 8, 10**9
    for key, at in list(inspect.signature(PATTERNS[name]).parameters.items())[1:]:
        key = key.removesuffix("_")
        too_much = at.annotation == "int" and at.default is not at.empty and at.default > largest
        if at.default is not at.empty and not too_much and (at.annotation not in DRAWN or not pen.chance(2)):
            most = min(most, at.default) if at.annotation == "int" else most
        elif at.annotation == "Tokens":
            places = sorted({pen.number(0, max(0, length - 2)) for _ in range(pen.number(1, 3))})
            text[key], last = places if len(places) > 1 else places[0], places[-1]
        elif at.annotation == "int" and at.default is at.empty:
            text[key] = pen.number(min(last + 1, length), length)
        elif at.annotation == "int":
            text[key] = most = largest = pen.number(1, max(1, most))
        else:
            text[key] = pen.number(1, 12) / 2
    return text
