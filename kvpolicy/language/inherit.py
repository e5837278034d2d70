"""`extends` and `--set`: what is merged into a policy's text before it is read as one."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from kvpolicy.errors import Diagnostic, PolicyError
from kvpolicy.language.library import fetch, is_path
from kvpolicy.language.nodes import Node, Source, Span, shown
from kvpolicy.language.policy import VERSION
from kvpolicy.language.reader import read
from kvpolicy.language.vocabulary import nearest

MAX_PARENTS = 8
NOT_INHERITED = ("name", "summary", "cite", "tests", "extends")


def complete(root: Node, chain: tuple[str, ...] = ()) -> Node:
    """A policy's document with its parents merged in, and nothing deleted that was not there.

    Every node keeps the place it came from. `chain` names the files that led here.
    """
    check_version(root)
    parent = find_parent(root, chain)
    diagnostics: list[Diagnostic] = []
    merged = merge(root, parent, diagnostics)
    if diagnostics:
        raise PolicyError(diagnostics=diagnostics)
    return merged


def check_version(root: Node) -> None:
    """The document must be a mapping that says which language it is written in."""
    first = Span(root.span.source, root.span.start, root.span.start + 1)
    if not isinstance(root.content, dict):
        hint = f"it begins with `kvpolicy: {VERSION}`"
        raise PolicyError(diagnostics=[first.diagnostic(f"a policy is a mapping, this is {root.kind}", hint)])
    version = root.content.get("kvpolicy")
    if version is None:
        hint = f"begin with `kvpolicy: {VERSION}`, the language's version"
        raise PolicyError(diagnostics=[first.diagnostic("the key `kvpolicy` is missing", hint)])
    if version.content != str(VERSION):
        reason = f"this policy is written in version {version.content} of the language"
        if not isinstance(version.content, str) or not re.fullmatch("[0-9.]{1,9}", version.content):
            reason = f"`kvpolicy` is the language's version, but this is {version.kind}"
        hint = f"this build reads version {VERSION}"
        raise PolicyError(diagnostics=[version.span.diagnostic(reason, hint)])


def find_parent(root: Node, chain: tuple[str, ...]) -> Node | None:
    """The complete document that this one extends."""
    node = root.content.get("extends")
    if node is None:
        return None
    if not isinstance(node.content, str):
        raise PolicyError(
            diagnostics=[node.span.diagnostic(f"the name or path of one parent expected, found {node.kind}")]
        )
    here = root.span.source.name
    try:
        text, name = fetch(node.content, here)
    except PolicyError as error:
        found = error.diagnostics[0]
        raise PolicyError(diagnostics=[node.span.diagnostic(f"{found.file}: {found.reason}", found.hint)]) from None
    files = (*chain, identity(here))
    if identity(name) in files:
        reason = (
            f"{shown(node.content)} extends this policy in turn" if len(files) > 1 else "a policy cannot extend itself"
        )
        raise PolicyError(
            diagnostics=[node.span.diagnostic(reason, "a policy has one line of parents, without a circle")]
        )
    if len(files) > MAX_PARENTS:
        raise PolicyError(diagnostics=[node.span.diagnostic(f"more than {MAX_PARENTS} parents in a row")])
    return complete(read(text, name), files)


def identity(name: str) -> str:
    """One spelling per file."""
    return name if name.startswith("<") or not is_path(name) else str(Path(name).resolve())


# Merging ---------------------------------------------------------------------------------------------------------


def merge(root: Node, parent: Node | None, diagnostics: list[Diagnostic]) -> Node:
    """`params`, `let`, `pools` and each pool merge by key; every value below is replaced whole; `null` deletes."""
    old = {key: node for key, node in parent.content.items() if key not in NOT_INHERITED} if parent else {}
    return replace(root, content=merge_keys(root, old, ("params", "let", "pools"), diagnostics))


def merge_keys(
    node: Node, old: Mapping[str, Node], deeper: Container[str], diagnostics: list[Diagnostic]
) -> dict[str, Node]:
    """A mapping's keys over its parent's. The keys in `deeper` are merged in turn, and pools once more."""
    merged = dict(old)
    for key, value in node.content.items():
        if value.content is None:
            merged.pop(key, None)
            if key not in old:
                diagnostics.append(forgotten(key, value, old))
        elif key in deeper and isinstance(value.content, dict):
            inner = old[key].content if key in old and isinstance(old[key].content, dict) else {}
            every_pool = value.content.keys() if key == "pools" else ()
            merged[key] = replace(value, content=merge_keys(value, inner, every_pool, diagnostics))
        else:
            diagnostics += override_blanks(value) if key == "overrides" else blanks(value)
            merged[key] = value
    return merged


def forgotten(key: str, value: Node, old: Mapping[str, Node]) -> Diagnostic:
    """`null` that deletes nothing is a value that was forgotten, or a misspelt key."""
    near = nearest(key, old) if old else ""
    hint = near if near.startswith("did") else blank_hint(value)
    reason = f"`{shown(key)}` has no value" + (", and the parent has none to delete" if old else "")
    return (value.key or value.span).diagnostic(reason, hint)


def blank_hint(value: Node) -> str:
    span = value.key or value.span
    glued = ":" in span.source.text[span.start : span.end]
    return "a space belongs after the colon" if glued else "leave it out, or give it a value"


def blanks(node: Node, allowed: int = 0) -> Iterator[Diagnostic]:
    """Values that were forgotten, below a node; in the first `allowed` levels they say something."""
    parts = node.content.values() if isinstance(node.content, dict) else node.content
    for part in parts if isinstance(node.content, (dict, tuple)) else ():
        if part.content is not None:
            yield from blanks(part, max(0, allowed - 1))
        elif not allowed:
            yield (part.key or part.span).diagnostic("a value is missing here", blank_hint(part))


def override_blanks(overrides: Node) -> Iterator[Diagnostic]:
    """In overrides, a pool or a key of a pool may be `null`."""
    for item in overrides.content if isinstance(overrides.content, tuple) else ():
        if not isinstance(item.content, dict):
            yield from blanks(replace(overrides, content=(item,)))
            continue
        for key, value in item.content.items():
            yield from blanks(value, 2) if key == "pools" else blanks(replace(item, content={key: value}))


# --set -----------------------------------------------------------------------------------------------------------

FLAG = "--set"
"""The name that flags go by in messages."""


def flag_span(name: str, value: object, key: bool = False) -> Span:
    """The place of a value that was set, or of its param's name, in the flag as a user types it."""
    source = Source(FLAG, f"{FLAG} {name}={value}")
    start, equals = len(FLAG) + 1, len(FLAG) + 1 + len(name)
    return Span(source, start, equals) if key else Span(source, equals + 1, len(source.text))


def with_values(root: Node, values: Mapping[str, object]) -> Node:
    """The document with params set to other values, each placed in the flag that set it."""
    params = root.content.get("params")
    known = params.content if params is not None and isinstance(params.content, dict) else {}
    changed = dict(known)
    diagnostics = []
    for name, value in values.items():
        if name not in known:
            hint = nearest(name, known) or "this policy has no params"
            span = flag_span(name, value, key=True)
            diagnostics.append(span.diagnostic(f"there is no param `{shown(name)}` to set", hint))
        elif isinstance(known[name].content, dict):
            node = Node(str(value), flag_span(name, value), flag_span(name, value, key=True), plain=True)
            changed[name] = replace(known[name], content={**known[name].content, "value": node})
    if diagnostics:
        raise PolicyError(diagnostics=diagnostics)
    return (
        root if params is None else replace(root, content={**root.content, "params": replace(params, content=changed)})
    )
