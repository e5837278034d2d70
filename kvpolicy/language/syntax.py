"""Text of a quantity -> tree: a tokeniser and a Pratt parser.

A tree is nested tuples only: ("const", numerator, denominator, is_share), ("name", "t"), ("size", "prompt"),
("seen", "prompt"), and (operation, argument, ...) for everything else. Lengths, depths and numbers are limited,
so that no text can hang the reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from kvpolicy.errors import PolicyError
from kvpolicy.language.vocabulary import FUNCTIONS, POOL_FUNCTIONS, nearest

Tree = tuple[Any, ...]

MAX_TEXT = 1000
MAX_NESTING = 40
MAX_DEPTH = 120
LIMIT = 10**30
"""No numerator or denominator may pass this, at any point of a computation."""


class QuantityError(PolicyError):
    """A quantity that cannot be read or evaluated; `offset` and `width` say where in its text, if known."""

    def __init__(self, reason: str, offset: int | None = None, width: int = 1, hint: str = "") -> None:
        super().__init__(f"{reason}: {hint}" if hint else reason)
        self.reason, self.offset, self.width, self.hint = reason, offset, width, hint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.offset, self.width, self.hint)


class Mention(NamedTuple):
    """A name, a pool (`size(prompt)` mentions "size(prompt)"), a share or a call, and where it stands in the text."""

    word: str
    offset: int
    width: int


@dataclass(frozen=True)
class Parsed:
    """A tree and what errors want to point at."""

    tree: Tree
    names: tuple[Mention, ...]
    shares: tuple[Mention, ...]
    calls: tuple[Mention, ...]


class Token(NamedTuple):
    kind: str  # "number", "word", "symbol", "end"
    text: str
    offset: int


TOKEN = re.compile(
    r"(?P<space>[ \t\r\n]+)"
    r"|(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[A-Za-z0-9_%]*)"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<symbol>//|<=|>=|==|[-+*/<>(),])"
)
NUMBER = re.compile(r"(?P<digits>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE](?P<exponent>[+-]?[0-9]+))?(?P<suffix>k|%)?")
FOREIGN = {
    "=": "equality is written `==`",
    "!": "there is no negation: `if(a == b, 0, 1)` says that a differs from b",
    "%": "a share is a number and the sign together, `50%`; there is no remainder operator",
    "^": "there are no powers: multiply",
    "&": "write `and`",
    "|": "write `or`",
    "?": "a choice is written `if(condition, then, else)`",
    "'": "an expression holds no strings",
    '"': "an expression holds no strings",
}


def tokenise(text: str) -> list[Token]:
    """Cut text into tokens, the last of kind "end"."""
    if len(text) > MAX_TEXT:
        raise QuantityError(
            f"this expression has {len(text)} characters, more than {MAX_TEXT}", 0, 1, "give its parts names with `let`"
        )
    tokens, offset = [], 0
    while offset < len(text):
        match = TOKEN.match(text, offset)
        if match is None:
            letter = text[offset]
            raise QuantityError(f"`{letter}` has no meaning in an expression", offset, 1, FOREIGN.get(letter, ""))
        if match.lastgroup != "space":
            tokens.append(Token(str(match.lastgroup), match.group(), offset))
        offset = match.end()
    tokens.append(Token("end", "", len(text.rstrip())))
    return tokens


def number(token: Token) -> Tree:
    """`1024`, `0.5`, `1e-3`, `4k` (4096) or `50%` (a half) -> a constant."""
    match = NUMBER.fullmatch(token.text)
    if match is None:
        hint = "numbers are written 1024, 0.5, 1e-3, 4k (= 4096), 50%"
        raise QuantityError(f"`{token.text}` is not a number", token.offset, len(token.text), hint)
    exponent = match["exponent"] or "0"
    if len(match["digits"]) > 31 or len(exponent) > 4 or abs(int(exponent)) > 30:
        raise too_large(token.text[:40], token.offset, len(token.text))
    value = Fraction(match["digits"]) * Fraction(10) ** int(exponent)
    value *= {"k": Fraction(1024), "%": Fraction(1, 100)}.get(match["suffix"], Fraction(1))
    if max(value.numerator, value.denominator) > LIMIT:
        raise too_large(token.text, token.offset, len(token.text))
    return ("const", value.numerator, value.denominator, match["suffix"] == "%")


def too_large(what: str, offset: int | None = None, width: int = 1) -> QuantityError:
    """The error for a number past LIMIT."""
    return QuantityError(f"`{what}` is beyond what is computed exactly (30 digits)", offset, width)


LEVEL = {"or": 1, "and": 2, "<": 3, "<=": 3, ">": 3, ">=": 3, "==": 3, "+": 4, "-": 4, "*": 5, "/": 5, "//": 5}
"""Binding power of the infix operators; a leading minus binds tighter (6), a call or a name tightest (7)."""

COMPARISONS = frozenset({"<", "<=", ">", ">=", "=="})


@dataclass
class Parser:
    """One pass over the tokens of one text."""

    text: str
    tokens: list[Token]
    index: int = 0
    nesting: int = 0
    names: list[Mention] = field(default_factory=list)
    shares: list[Mention] = field(default_factory=list)
    calls: list[Mention] = field(default_factory=list)

    @property
    def here(self) -> Token:
        return self.tokens[self.index]

    def take(self) -> Token:
        token = self.here
        self.index += token.kind != "end"
        return token

    def accept(self, text: str) -> bool:
        if self.here.kind == "symbol" and self.here.text == text:
            self.index += 1
            return True
        return False

    def expect(self, text: str, after: str) -> None:
        if not self.accept(text):
            raise self.surprise(f"`{text}` expected {after}")

    def surprise(self, expected: str) -> QuantityError:
        token = self.here
        found = f"found `{token.text}`" if token.kind != "end" else "the expression ends here"
        return QuantityError(f"{expected}, but {found}", token.offset, max(1, len(token.text)))

    def whole(self) -> Tree:
        tree = self.expression(0)
        if self.here.kind != "end":
            raise self.surprise("an operator expected")
        return tree

    def expression(self, level: int) -> Tree:
        """Operators that bind tighter than `level`, left to right."""
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            hint = "give inner parts names with `let`"
            raise QuantityError(f"nested deeper than {MAX_NESTING} levels", self.here.offset, 1, hint)
        left = self.operand()
        compared = False
        while LEVEL.get(self.here.text, 0) > level:
            operator = self.take()
            if operator.text in COMPARISONS:
                if compared:
                    hint = "write `a < b and b < c`"
                    raise QuantityError("comparisons do not chain", operator.offset, len(operator.text), hint)
                compared = True
            else:
                compared = False
            left = (operator.text, left, self.expression(LEVEL[operator.text]))
        self.nesting -= 1
        return left

    def operand(self) -> Tree:
        token = self.take()
        if token.kind == "number":
            tree = number(token)
            if tree[3]:
                self.shares.append(Mention(token.text, token.offset, len(token.text)))
            return tree
        if token.kind == "word":
            return self.word(token)
        if token.text == "-":
            return ("neg", self.expression(6))
        if token.text == "(":
            tree = self.expression(0)
            self.expect(")", f"to close the `(` at character {token.offset + 1}")
            return tree
        self.index -= token.kind != "end"
        raise self.surprise("a number, a name or `(` expected")

    def word(self, token: Token) -> Tree:
        if token.text in ("and", "or", "not"):
            self.index -= 1
            raise self.surprise("a number, a name or `(` expected")
        called = self.here.kind == "symbol" and self.here.text == "("
        if not called:
            if token.text in FUNCTIONS or token.text in POOL_FUNCTIONS:
                what = "a pool's name" if token.text in POOL_FUNCTIONS else "arguments"
                hint = f"write `{token.text}(…)`"
                raise QuantityError(f"`{token.text}` needs {what}", token.offset, len(token.text), hint)
            self.names.append(Mention(token.text, token.offset, len(token.text)))
            return ("name", token.text)
        if token.text in POOL_FUNCTIONS:
            return self.pool(token)
        return self.call(token)

    def pool(self, token: Token) -> Tree:
        self.expect("(", f"after `{token.text}`")
        name = self.take()
        if name.kind != "word" or not self.accept(")"):
            self.index -= name.kind not in ("word", "end")
            raise self.surprise(f"`{token.text}` takes the name of one pool, as in `{token.text}(prompt)`")
        mention = f"{token.text}({name.text})"
        self.names.append(Mention(mention, token.offset, name.offset + len(name.text) + 1 - token.offset))
        return (token.text, name.text)

    def call(self, token: Token) -> Tree:
        if token.text not in FUNCTIONS:
            hint = nearest(token.text, (*FUNCTIONS, *POOL_FUNCTIONS))
            raise QuantityError(f"`{token.text}` is not a function", token.offset, len(token.text), hint)
        self.expect("(", f"after `{token.text}`")
        arguments = [self.expression(0)]
        while self.accept(","):
            arguments.append(self.expression(0))
        self.expect(")", f"to close `{token.text}(`, or `,` before a further argument")
        least, most, _ = FUNCTIONS[token.text]
        if len(arguments) < least or (most is not None and len(arguments) > most):
            wanted = f"{least} or more" if most is None else str(least)
            plural = "" if wanted == "1" else "s"
            reason = f"`{token.text}` takes {wanted} argument{plural}, {len(arguments)} given"
            raise QuantityError(reason, token.offset, len(token.text))
        end = self.tokens[self.index - 1].offset + 1
        self.calls.append(Mention(token.text, token.offset, end - token.offset))
        return (token.text, *arguments)


@lru_cache(maxsize=4096)
def parse(text: str) -> Parsed:
    """Read one expression. Raises QuantityError, with an offset into `text`."""
    tokens = tokenise(text)
    if tokens[0].kind == "end":
        raise QuantityError("an expression expected, but nothing is here", 0, 1)
    parser = Parser(text, tokens)
    tree = parser.whole()
    if max(level for _, level in nodes(tree)) > MAX_DEPTH:
        raise QuantityError(f"more than {MAX_DEPTH} operations hang on each other", 0, 1, "give parts names with `let`")
    return Parsed(tree, tuple(parser.names), tuple(parser.shares), tuple(parser.calls))


def nodes(tree: Tree) -> Iterator[tuple[Tree, int]]:
    """Every node with its level, the root's being 1; found without recursion, in no special order."""
    stack = [(tree, 1)]
    while stack:
        node, level = stack.pop()
        yield node, level
        if node[0] not in ("const", "name", *POOL_FUNCTIONS):
            stack += [(child, level + 1) for child in node[1:]]
