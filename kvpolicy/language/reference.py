"""The language reference, as Markdown: keys, values, defaults and meanings, all read from the models."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from kvpolicy.language.base import OneOrMany, Spelled, Strict, Unless
from kvpolicy.language.policy import LayerRange, Override, Param, Policy, PolicyTest
from kvpolicy.language.pool import Admit, Evict, Pin, Pool, Read, Store, Update
from kvpolicy.language.quantity import Quantity
from kvpolicy.language.schema import as_written
from kvpolicy.language.scope import Role
from kvpolicy.language.scorer import Hit, Memory, Queries, Scorer, Signal, Smooth
from kvpolicy.language.signals import SIGNALS
from kvpolicy.language.vocabulary import FUNCTIONS, PLAN_NAMES, POOL_FUNCTIONS, ROW_NAMES

SECTIONS: tuple[tuple[str, tuple[type[Strict], ...]], ...] = (
    ("Top level", (Policy, Param)),
    ("Pools", (Pool, Admit, Pin, Evict, Update, Read, Store)),
    ("Scorers", (Scorer, Signal, Queries, Smooth, Hit, Memory)),
    ("Overrides and tests", (Override, PolicyTest)),
)
"""Every model of the language, in the order of the page; a test holds it against the models that Policy reaches."""


def render_reference() -> str:
    """The generated part of docs/language.md."""
    parts = []
    for title, models in SECTIONS:
        parts.append(f"## {title}\n")
        for model in models:
            parts += [f"### {title_of(model)}\n", f"{summary(model)}\n", "\n".join(rows(model)) + "\n"]
    parts += ["## Expressions\n", "\n".join(expression_rows())]
    return "\n".join(parts).rstrip() + "\n"


def title_of(model: type[Strict]) -> str:
    """`Pool` -> "pool", `PolicyTest` -> "test"."""
    return {PolicyTest: "test", Pin: "pinned"}.get(model, model.__name__.lower())


def summary(model: type[Strict]) -> str:
    return text((model.__doc__ or "").split("\n\n")[0])


def rows(model: type[Strict]) -> Iterator[str]:
    """A table of a model's keys, or of its spellings."""
    if model is Signal:
        yield from signal_rows()
    elif issubclass(model, Spelled):
        yield from table("value", "meaning")
        for word, (meaning, _) in model.WORDS.items():
            yield row(code(word), meaning)
        for key, name in model.forms().items():
            field = model.model_fields[name]
            yield row(code(f"{{{key}: …}}") + f" with {value_of(field)}", text(field.description))
    else:
        yield from table("key", "value", "default", "meaning")
        for name, field in model.model_fields.items():
            yield row(code(field.alias or name), value_of(field), default_of(field), text(field.description))


def signal_rows() -> Iterator[str]:
    yield from table("value", "arguments", "meaning")
    for name, signal in SIGNALS.items():
        told = "; ".join(
            f"`{key}`: {a.meaning}, {code(str(as_written(a.default)))} by default"
            for key, a in signal.arguments.items()
        )
        yield row(code(name), told, signal.meaning)
    yield row("a plug-in's name", "as the plug-in says", "from the entry-point group `kvpolicy.scorers`")


def expression_rows() -> Iterator[str]:
    yield from table("name", "known", "meaning")
    for name, meaning in PLAN_NAMES.items():
        yield row(code(name), "when the plan is made", meaning)
    for name, meaning in ROW_NAMES.items():
        yield row(code(name), "in each pass, per row", meaning)
    for name, meaning in POOL_FUNCTIONS.items():
        yield row(code(f"{name}(pool)"), "in each pass, per row", meaning)
    yield ""
    yield from table("function", "meaning")
    letters = ("a", "b", "c")
    for name, function in FUNCTIONS.items():
        arguments = ", ".join(letters[: function.least]) + (", …" if function.most is None else "")
        yield row(code(f"{name}({arguments})"), function.meaning)


# Cells -----------------------------------------------------------------------------------------------------------


def table(*heads: str) -> Iterator[str]:
    yield row(*heads)
    yield row(*("---" for _ in heads))


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def code(words: str) -> str:
    return f"`{words}`"


def text(description: str | None) -> str:
    return " ".join((description or "").split())


def default_of(field: FieldInfo) -> str:
    """The default as it would be written; blank where a key is required or its absence says it all."""
    if field.is_required():
        return "required"
    written = next((item.word for item in field.metadata if isinstance(item, Unless)), as_written(field.default))
    if isinstance(written, dict):
        return code("{" + ", ".join(f"{key}: {value}" for key, value in written.items()) + "}")
    if isinstance(written, bool):
        return code(str(written).lower())
    return "" if written in (None, "") else code(str(written))


def value_of(field: FieldInfo) -> str:
    """What a key's value may be, in words."""
    annotation: Any = field.annotation
    for item in field.metadata:
        annotation = Annotated[annotation, item]
    return describe(annotation)


UNITS = {
    "tokens": "a number of tokens",
    "count": "a whole number",
    "share": "a share from 0 to 1",
    "number": "a number",
}
WORDS = {
    str: "text",
    int: "a whole number",
    bool: "`true` or `false`",
    LayerRange: "`3`, `0..3`, `-1`",
    Quantity: "a quantity",
}


def describe(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_annotated(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in arguments if part is not type(None))
    if origin is Literal:
        return " · ".join(code(str(word)) for word in arguments)
    if origin is dict:
        return "any keys" if arguments[1] is Any else f"a mapping of names to {describe(arguments[1])}"
    if origin is tuple:
        return f"a list of {describe(arguments[0])}" if arguments[-1] is Ellipsis else "pairs of numbers"
    if isinstance(annotation, type) and issubclass(annotation, Strict) and annotation not in WORDS:
        return f"[{title_of(annotation)}](#{title_of(annotation)})"
    return WORDS.get(annotation, str(annotation))


def describe_annotated(inner: Any, notes: tuple[Any, ...]) -> str:
    for note in notes:
        if isinstance(note, Role):
            return UNITS[note.unit] + (", known when the plan is made" if note.when == "plan" else "")
        if isinstance(note, Unless):
            return f"`{note.word}` or {describe(inner)}"
        if isinstance(note, OneOrMany):
            return f"{describe(inner).removeprefix('a list of ')}, or a list"
    if get_origin(inner) is Literal and "logits-max" in get_args(inner):
        return describe(inner).replace("logits-max", "{logits: max}")
    return describe(inner)
