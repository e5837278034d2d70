"""YAML text -> nodes.

YAML is read as plain data, version 1.2: `no` is a string, `1e-3` a number, and every scalar keeps its own text. What
could run code, copy itself, or hide a second value is refused with its place: tags, anchors and aliases, merge keys,
duplicate keys, several documents. PyYAML's events are used as they come, so that depth is limited before anything
is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from kvpolicy.errors import Diagnostic, PolicyError
from kvpolicy.language.nodes import Node, Source, Span, shown

MAX_CHARACTERS = 64 * 1024
MAX_DEPTH = 24

PLAIN = {"": None, "~": None, "null": None, "Null": None, "NULL": None, "true": True, "false": False}
PLAIN |= {"True": True, "TRUE": True, "False": False, "FALSE": False}
NO_COPIES = "write the value out; `let` names what is used twice"
TRAP = "inside `{…}` and `[…]` a comma ends the value: quote the expression, or write the mapping as an indented block"


def read(text: str, name: str) -> Node:
    """The root node of a YAML text. Raises PolicyError with a diagnostic for every mistake found at once."""
    source = Source(name, text.removeprefix("\ufeff"))
    whole = Span(source, 0, 1)
    if len(text) > MAX_CHARACTERS:
        raise PolicyError(
            diagnostics=[whole.diagnostic(f"more than {MAX_CHARACTERS} characters: too long for a policy")]
        )
    builder = Builder(source)
    try:
        root = builder.document(yaml.parse(source.text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        raise PolicyError(diagnostics=[syntax_error(source, error)]) from None
    except yaml.reader.ReaderError as error:
        letter = Span(source, error.position, error.position + 1)
        raise PolicyError(
            diagnostics=[letter.diagnostic(f"the character U+{error.character:04X} cannot stand in YAML")]
        ) from None
    if builder.diagnostics:
        raise PolicyError(diagnostics=builder.diagnostics)
    if root is None or root.content is None:
        raise PolicyError(diagnostics=[whole.diagnostic("nothing is here", "a policy begins with `kvpolicy: 1`")])
    return root


KNOWN_ERRORS = (
    ("'\\t' that cannot start", "a tab stands here", "indent with spaces"),
    ("that cannot start any token", "no value begins with this character", "quote the text that begins here"),
    (
        "mapping values are not allowed",
        "a second colon in one line",
        "quote a text that holds `: `, or check the indentation",
    ),
    ("could not find expected ':'", "a line without `key: value`", "every key is followed by a colon and a space"),
    ("expected <block end>", "this is indented unlike the lines above", "indent the keys of one mapping alike"),
    (
        "sequence entries are not allowed",
        "a list cannot begin here",
        "begin it on a line of its own, or write `[a, b]`",
    ),
    ("expected ',' or", "a comma or the closing bracket is missing before this", ""),
    ("expected the node content", "a key or a value is missing before this", ""),
    ("expected '<document start>'", "a second value begins here", "a policy is one mapping"),
)
"""Words of PyYAML's message, what they mean, and the way out."""


def syntax_error(source: Source, error: yaml.MarkedYAMLError) -> Diagnostic:
    """What PyYAML found wrong, placed, with a way out where one is known."""
    problem = shown(error.problem or "this cannot be read", 200)
    unclosed = "stream end" in problem or "end of stream" in problem
    begun = unclosed or "could not find expected" in problem  # then the culprit is where the reading began
    mark = (error.context_mark if begun else None) or error.problem_mark or error.context_mark
    index = min(mark.index, len(source.text)) if mark else 0
    while index and index >= len(source.text.rstrip()):  # what is missing at the end belongs to the last word
        index -= 1
    span = Span(source, index, index + 1)
    if unclosed:
        opener = source.text[index : index + 1]
        return span.diagnostic(
            f"not YAML: what `{opener}` begins is never finished", "close the quote, bracket or brace"
        )
    reason, hint = next(((reason, hint) for words, reason, hint in KNOWN_ERRORS if words in problem), (problem, ""))
    return span.diagnostic(f"not YAML: {reason}", hint)


@dataclass
class Builder:
    """Nodes out of PyYAML's events; mistakes are collected in `diagnostics`."""

    source: Source
    diagnostics: list[Diagnostic] = field(default_factory=list)

    def complain(self, span: Span, reason: str, hint: str = "") -> None:
        self.diagnostics.append(span.diagnostic(reason, hint))

    def span(self, event: Any) -> Span:
        return Span(self.source, event.start_mark.index, event.end_mark.index)

    def document(self, events: Iterator[yaml.Event]) -> Node | None:
        root = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    self.complain(self.span(event), "a second document begins here", "one file holds one policy")
                    break
                if event.version or event.tags:
                    self.complain(self.span(event), "directives have no meaning in a policy", "leave the `%` line out")
            elif isinstance(event, yaml.NodeEvent):
                root = self.node(event, events, 1, False)
        return root

    def node(self, event: Any, events: Iterator[yaml.Event], depth: int, flow: bool) -> Node:
        """The node that begins with `event`; the events that belong to it are consumed."""
        span = self.span(event)
        if depth > MAX_DEPTH:
            raise PolicyError(
                diagnostics=[*self.diagnostics, span.diagnostic(f"nested deeper than {MAX_DEPTH} levels")]
            )
        if isinstance(event, yaml.AliasEvent):
            self.complain(span, f"`*{shown(event.anchor)}` copies another value; aliases are refused", NO_COPIES)
            return Node("", span)
        if event.anchor is not None:
            self.complain(span, f"`&{shown(event.anchor)}` marks a value for copying; anchors are refused", NO_COPIES)
        if event.tag is not None:
            reason = f"the tag `{shown(event.tag)}` asks for a type; tags are refused"
            self.complain(span, reason, "a policy is plain data: leave the tag out")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, span, flow)
        inner = flow or bool(event.flow_style)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(span, events, depth, inner)
        return self.mapping(span, events, depth, inner)

    def scalar(self, event: yaml.ScalarEvent, span: Span, flow: bool) -> Node:
        plain = event.style is None or event.style == ""
        if plain and flow and event.value.count("(") > event.value.count(")"):
            after = self.source.text[span.end :].lstrip()
            if after.startswith(","):
                self.complain(span, f"the comma after `{shown(event.value)}` splits the call in two", TRAP)
        content = PLAIN.get(event.value, event.value) if plain else event.value
        return Node(content, span, plain=plain)

    def sequence(self, span: Span, events: Iterator[yaml.Event], depth: int, flow: bool) -> Node:
        items: list[Node] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                return Node(tuple(items), self.closed(span, event, flow))
            items.append(self.node(event, events, depth + 1, flow))
        raise AssertionError("PyYAML closes every sequence")

    def mapping(self, span: Span, events: Iterator[yaml.Event], depth: int, flow: bool) -> Node:
        entries: dict[str, Node] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                return Node(entries, self.closed(span, event, flow))
            key = self.node(event, events, depth + 1, False)
            value = replace(self.node(next(events), events, depth + 1, flow), key=key.span)
            name = self.key_name(key, value)
            if name in entries:
                first = entries[name].key
                assert first is not None
                reason = f"`{shown(name)}` is given twice; the first is in line {first.line}"
                self.complain(key.span, reason, "keep one of them")
            elif name is not None:
                entries[name] = value
        raise AssertionError("PyYAML closes every mapping")

    def key_name(self, key: Node, value: Node) -> str | None:
        """The key's text; None when it cannot be one."""
        if isinstance(key.content, (dict, tuple)):
            self.complain(key.span, f"a key is a word, found {key.kind}")
            return None
        text = self.source.text[key.span.start : key.span.end] if key.plain else str(key.content)
        if text == "<<" and key.plain:
            hint = "write the keys out, or use `extends` for a whole policy"
            self.complain(key.span, "`<<` copies another mapping's keys; merge keys are refused", hint)
            return None
        if not text:
            self.complain(value.span, "a key is missing before the colon")
            return None
        return text

    def closed(self, span: Span, event: Any, flow: bool) -> Span:
        """From the start to the end of a collection; a block's end mark lies past its trailing blank lines."""
        end = event.end_mark.index
        return replace(span, end=end if flow else max(span.start + 1, len(self.source.text[:end].rstrip())))
