"""A policy's text with another name and other defaults: only what changes is replaced, so that comments stay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvpolicy.language.definitions import section
from kvpolicy.language.inherit import complete
from kvpolicy.language.load import Text, loads_policy
from kvpolicy.language.nodes import Node
from kvpolicy.language.reader import read


@dataclass(frozen=True)
class Edit:
    """Characters start..end (end excluded) give way to ``text``."""

    start: int
    end: int
    text: str


def rewritten(text: str, filename: str, *, name: str, defaults: Mapping[str, str]) -> str:
    """The text of a policy that is called ``name`` and has other defaults of some params.

    What is replaced is what differs; the tests of the policy are told the old defaults that they counted on. A policy
    that extends another is written out whole, without the comments of either but for those at its head.

    Args:
        filename: from where the text is, for its parent's path and for messages.
        defaults: by param, a value as a policy writes it.

    Raises:
        PolicyError: the text, or what would come of it, is no policy.
    """
    policy = loads_policy(text, filename)
    changed = {key: value for key, value in defaults.items() if value != policy.params[key].default.text}
    before = {key: policy.params[key].default.text for key in changed}
    root = read(text, filename)
    if "extends" in root.content:
        head = re.match(r"(?:[ \t]*(?:#.*)?\n)*", text)
        text = (head[0] if head else "") + Text(complete(root)).to_yaml()
        root = read(text, filename)
    edits = [*_name(root, name), *_defaults(root, changed), *_tests(root, before)]
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    loads_policy(text, filename)
    return text


def _name(root: Node, name: str) -> Iterator[Edit]:
    span = root.content["name"].span
    yield Edit(span.start, span.end, name)


def _defaults(root: Node, changed: Mapping[str, str]) -> Iterator[Edit]:
    params = section(root, "params")
    for key, value in changed.items():
        span = params[key].content["default"].span
        yield Edit(span.start, span.end, value)


def _tests(root: Node, before: Mapping[str, str]) -> Iterator[Edit]:
    """Every test sets what it left at the default, where that is another now."""
    tests = root.content.get("tests")
    for test in tests.content if tests is not None else ():
        given = test.content.get("set")
        missing = [
            f"{key}: {value}" for key, value in before.items() if given is None or key not in (given.content or {})
        ]
        if missing:
            yield _also_set(test, given, missing)


def _also_set(test: Node, given: Node | None, missing: list[str]) -> Edit:
    source = test.span.source
    if given is None:  # before the test's first key, in its own style
        first = next(iter(test.content.values())).key
        assert first is not None
        after = ", " if _is_flow(test) else "\n" + " " * (first.column - 1)
        return Edit(first.start, first.start, f"set: {{{', '.join(missing)}}}{after}")
    if _is_flow(given):
        at = given.span.start + 1
        return Edit(at, at, ", ".join(missing) + (", " if given.content else ""))
    first = next(iter(given.content.values())).key
    assert first is not None and source is given.span.source
    lines = "".join(f"{line}\n{' ' * (first.column - 1)}" for line in missing)
    return Edit(first.start, first.start, lines)


def _is_flow(node: Node) -> bool:
    return node.span.source.text[node.span.start] in "{["
