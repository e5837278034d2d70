"""Values that know where they stand: sources, spans, and the nodes that a policy's text is made of."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kvpolicy.errors import Diagnostic


def shown(text: object, limit: int = 60) -> str:
    """A user's text made fit for one line of a message."""
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"


@dataclass(frozen=True)
class Source:
    """A text and the name it goes by in messages."""

    name: str
    text: str = field(repr=False)

    @cached_property
    def starts(self) -> list[int]:
        """Index of the first character of each line."""
        return [0, *(match.end() for match in re.finditer(r"\r\n|\n|\r", self.text))]

    def line(self, number: int) -> str:
        """The line's text, counted from 1, without its end."""
        end = self.starts[number] if number < len(self.starts) else len(self.text)
        return self.text[self.starts[number - 1] : end].rstrip("\r\n")


@dataclass(frozen=True)
class Span:
    """Characters start..end (end excluded) of a source."""

    source: Source
    start: int
    end: int

    @property
    def line(self) -> int:
        return bisect_right(self.source.starts, self.start)

    @property
    def column(self) -> int:
        return self.start - self.source.starts[self.line - 1] + 1

    def diagnostic(self, reason: str, hint: str = "") -> Diagnostic:
        """A message about this place; what passes the end of the line is not underlined."""
        text = self.source.line(self.line)
        snippet = "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        width = min(max(1, self.end - self.start), max(1, len(snippet.rstrip()) - self.column + 1))
        return Diagnostic(self.source.name, self.line, self.column, reason, hint, snippet, width)


@dataclass(frozen=True)
class Node:
    """A value and its place. `content` is a text, True, False, None, a tuple of nodes, or nodes by key.

    `key` is the place of the key that holds the node; `plain` says that a scalar was written without quotes.
    """

    content: Any
    span: Span
    key: Span | None = None
    plain: bool = False

    @property
    def kind(self) -> str:
        """What this is, in a user's words."""
        if isinstance(self.content, dict):
            return "a mapping"
        if isinstance(self.content, tuple):
            return "a list"
        if isinstance(self.content, str):
            return f"`{shown(self.content)}`"
        return "nothing" if self.content is None else f"`{str(self.content).lower()}`"

    def data(self) -> Any:
        """Plain Python data, as the models want it: every scalar but true, false and null is a string."""
        if isinstance(self.content, dict):
            return {key: node.data() for key, node in self.content.items()}
        if isinstance(self.content, tuple):
            return [node.data() for node in self.content]
        return Scalar(self.content, self.plain) if isinstance(self.content, str) else self.content

    def part(self, offset: int | None, width: int = 1) -> Span:
        """The place of characters of a scalar, whatever quotes, escapes and line breaks it is written with."""
        if offset is None or not isinstance(self.content, str):
            return self.span
        raw = self.span.source.text
        index = self.span.start
        if raw[index : index + 1] in ("|", ">") and not self.plain:
            index = raw.find("\n", index, self.span.end) + 1 or index
        elif not self.plain:
            index += 1  # the quote
        last = index
        for letter in self.content[: offset + 1]:
            if letter.isspace():
                continue
            index = raw.find(letter, index, self.span.end)
            if index < 0:
                return self.span
            last, index = index, index + 1
        at = last if offset < len(self.content) else index
        return Span(self.span.source, at, at + width)


class Scalar(str):
    """A scalar's text; `plain` tells `no` from `"no"`."""

    plain: bool

    def __new__(cls, text: str, plain: bool) -> Scalar:
        self = super().__new__(cls, text)
        self.plain = plain
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Scalar, (str(self), self.plain)

    @property
    def typed(self) -> str | int | float:
        """The value under YAML 1.2's core schema, for places that take any value."""
        if self.plain and re.fullmatch(r"[-+]?[0-9]{1,18}", self):
            return int(self)
        if self.plain and re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,3})?", self):
            return float(self)
        return str(self)


def typed(data: Any) -> Any:
    """Data with every scalar given the type YAML 1.2 gives it."""
    if isinstance(data, dict):
        return {str(key): typed(value) for key, value in data.items()}
    if isinstance(data, list):
        return [typed(value) for value in data]
    return data.typed if isinstance(data, Scalar) else data
