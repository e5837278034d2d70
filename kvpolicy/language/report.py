"""Mistakes found by the models -> diagnostics that point into the text.

Unknown keys are shown at the key, bad values at the value, missing keys at what should hold them.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kvpolicy.errors import Diagnostic, PolicyError
from kvpolicy.language.base import Complaint, KnownMistake, Strict
from kvpolicy.language.definitions import Path, Placed
from kvpolicy.language.nodes import Node, Span, shown
from kvpolicy.language.policy import Policy
from kvpolicy.language.syntax import QuantityError
from kvpolicy.language.vocabulary import nearest

MOST = 50
"""Mistakes shown of one policy."""


def find(root: Node, path: Path) -> Node:
    """The node a path leads to; parts of the path that are not in the text are passed over."""
    node = root
    for part in path:
        content = node.content
        if isinstance(content, dict):
            node = content.get(str(part), node)
        elif isinstance(content, tuple) and isinstance(part, int) and part < len(content):
            node = content[part]
    return node


def place(root: Node, path: Path, complaint: Complaint) -> Diagnostic:
    """A complaint, at its place in the text."""
    node = find(root, (*path, *complaint.path))
    span = node.part(complaint.offset, complaint.width)
    if complaint.word and isinstance(node.content, str) and complaint.word in node.content:
        span = node.part(node.content.index(complaint.word), len(complaint.word))
    if complaint.on == "key" and node.key is not None:
        span = node.key
    return span.diagnostic(complaint.reason, complaint.hint)


def gather(root: Node, placed: Iterable[Placed]) -> list[Diagnostic]:
    return [place(root, path, complaint) for path, complaint in placed]


def refuse(diagnostics: Iterable[Diagnostic], root: Node) -> None:
    """Raise PolicyError with all diagnostics, in the order of the text, if there are any."""
    own = root.span.source.name
    ordered = sorted(set(diagnostics), key=lambda d: (d.file != own, d.file, d.line, d.column, d.reason))
    if len(ordered) > MOST:
        more = f"{len(ordered) - MOST} more mistakes are not shown"
        ordered = [*ordered[:MOST], Diagnostic(own, 0, 0, more)]
    if ordered:
        raise PolicyError(diagnostics=ordered)


def from_models(root: Node, failure: ValidationError) -> list[Diagnostic]:
    """One diagnostic for every error that pydantic found, consequences of other mistakes left out."""
    found = []
    for error in failure.errors(include_url=False):
        path = tuple(error["loc"])
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, KnownMistake):
            continue
        if isinstance(cause, QuantityError):
            cause = Complaint(cause.reason, cause.hint, (), "value", cause.offset, cause.width)
        if isinstance(cause, Complaint):
            found.append(place(root, path, cause))
        elif error["type"] == "missing":
            found.append(missing(root, path))
        else:
            complaint = translate(error, find(root, path), path)
            found.append(place(root, path, complaint))
    return found


def missing(root: Node, path: Path) -> Diagnostic:
    """A key that is not there: shown at the key of what should hold it, or where that begins."""
    holder = find(root, path[:-1])
    if isinstance(holder.content, tuple):
        return holder.span.diagnostic("a pair of numbers expected", "as in `[3, 0]`: layer 3, KV head 0")
    span = holder.key or Span(holder.span.source, holder.span.start, holder.span.start + 1)
    model, key = model_at(path[:-1]), str(path[-1])
    example = getattr(model, "EXAMPLE", "")
    meaning = model.model_fields[key].description if model and key in model.model_fields else ""
    return span.diagnostic(
        f"the key `{key}` is missing here", f"as in `{example}`" if example else f"it says {meaning}"
    )


EXPECTED = {
    "string_type": "a text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "bool_type": "`true` or `false`",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "too_long": "a pair of numbers",
}


def translate(error: Any, node: Node, path: Path) -> Complaint:
    """Pydantic's own kinds of error in this language's words."""
    kind, last = error["type"], path[-1] if path else ""
    if kind == "extra_forbidden":
        model = model_at(path[:-1])
        owner = getattr(model, "NOUN", "") or f"`{path[-2]}`"
        return Complaint(f"`{shown(last)}` is not a key of {owner}", nearest(str(last), keys_of(model)), on="key")
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return Complaint(f"{node.kind} is not a value of `{last}`", nearest(str(node.content), words))
    expected = EXPECTED.get(kind)
    if expected is None:
        return Complaint(shown(error["msg"], 200))
    subject = f"`{shown(last)}` is {expected}" if isinstance(last, str) and last else f"{expected} expected"
    hint = "write `[…]`, or each item on a line of its own after `- `" if expected == "a list" else ""
    if expected == "a mapping":
        example = getattr(model_at(path), "EXAMPLE", "")
        hint = f"as in `{example}`" if example else ""
        if isinstance(node.content, str) and re.search(r"[a-z_]:\S", node.content):
            hint = "a space belongs after the colon"
    return Complaint(f"{subject}, but this is {node.kind}", hint)


def keys_of(model: type[BaseModel] | None) -> list[str]:
    """The keys that a mapping may have."""
    return [info.alias or name for name, info in model.model_fields.items()] if model else []


def model_at(path: Path) -> type[BaseModel] | None:
    """The model that reads the mapping at a path, found by walking the models' own types."""
    here: Any = Policy
    for part in path:
        if isinstance(here, type) and issubclass(here, Strict):
            fields = {info.alias or name: info.annotation for name, info in here.model_fields.items()}
            here = bare(fields.get(str(part)))
        elif get_origin(here) in (dict, tuple):
            arguments = [argument for argument in get_args(here) if argument is not Ellipsis]
            here = bare(arguments[-1])
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None


def bare(annotation: Any) -> Any:
    """A type without Annotated and None."""
    while get_origin(annotation) in (Annotated, Union, types.UnionType):
        inner = [argument for argument in get_args(annotation) if argument is not type(None)]
        annotation = inner[0]
    return annotation
