"""The problems that `builtin:reasoner` solves: work out a chain of sums, a line for each, out of facts and definitions.

    prompt   F5z3t5q9>wzq>Lww>nLt|
    output   w=z+q:3+9:w2;L=w+w:2+2:L4;n=L+t:4+5:n9;

The prompt tells facts (F is 5, z is 3), then definitions in the order in which they are to be worked out (w is z plus
q). Every line of the output names a definition, its numbers, and the result, modulo 10. Every character is a token.

Nothing can be guessed: to write a line the model looks up its definition, its two operands, wherever they were told,
and adds. So a token is needed at places that the problem's author decides, and these are what RaaS (arXiv:2502.11147)
found in the reasoning of large models:

- Milestones: some results are used again and again for a while, and then never more.
- Phoenixes: definitions are silent until their line comes, and some facts until late in the output.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

NAMES = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
MARKS = ">|=+:;"
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = (*SPECIALS, *MARKS, *DIGITS, *NAMES)
"""Every token, in the order of the token ids."""

STEPS, FACTS = 32, 10
"""Of a problem, unless others are asked for."""

LINE = len("w=z+q:3+9:w2;")
"""Tokens of a line of the output."""

MILESTONES = 2
"""Results that are milestones at any one time."""

LIFE = (8, 20)
"""For how many lines, at least and at most, a milestone is used."""

REST = 4
"""Lines after which a milestone is used again, at the latest; one more where two are due in the same line."""

LATE = 0.6
"""Share of the lines after which facts are used that were silent until then: a third of all facts."""

RECENT = 3
"""Results that a line uses most often: those of so many lines before it."""


class Definition(NamedTuple):
    """The result `name` is the sum of the two others, modulo 10."""

    name: str
    first: str
    second: str


@dataclass(frozen=True)
class Problem:
    """What is told and what is to be worked out.

    facts: names and values, in the order in which they are told. definitions: in theirs.
    milestones: (name, the line where it is last used) of results that were chosen to be used for a while. phoenixes:
    names of facts that were chosen to be used late.
    """

    facts: tuple[tuple[str, int], ...]
    definitions: tuple[Definition, ...]
    milestones: tuple[tuple[str, int], ...]
    phoenixes: tuple[str, ...]

    @cached_property
    def value(self) -> dict[str, int]:
        """Of facts and results."""
        found = dict(self.facts)
        for name, first, second in self.definitions:
            found[name] = (found[first] + found[second]) % len(DIGITS)
        return found

    @property
    def prompt(self) -> str:
        """What the model reads."""
        told = "".join(f"{name}{value}" for name, value in self.facts)
        return told + "".join(f">{name}{first}{second}" for name, first, second in self.definitions) + "|"

    @property
    def output(self) -> str:
        """The one right output."""
        return "".join(
            f"{name}={first}+{second}:{self.value[first]}+{self.value[second]}:{name}{self.value[name]};"
            for name, first, second in self.definitions
        )


@dataclass
class _Milestone:
    name: str
    until: int
    used: int


class _Author:
    """Chooses the operands of one problem, line after line."""

    def __init__(self, rng: random.Random, results: list[str], facts: list[str]) -> None:
        self.rng, self.results = rng, results
        self.late, self.early = facts[: max(1, len(facts) // 3)], facts[max(1, len(facts) // 3) :]
        self.alive: list[_Milestone] = []
        self.milestones: list[_Milestone] = []

    def operands(self, line: int) -> tuple[str, str]:
        """What the line adds, in any order: often a result of the lines just before, and a milestone or a fact."""
        rng, recent = self.rng, self.results[max(0, line - RECENT) : line]
        self._appoint(line, recent)
        first = rng.choice(recent) if recent and rng.random() < 0.75 else self._fact(line)
        due = [each for each in self.alive if line - each.used >= REST]
        draw = rng.random()
        if due or (self.alive and draw < 0.35):
            chosen = due[0] if due else rng.choice(self.alive)
            chosen.used, second = line, chosen.name
        else:
            second = rng.choice(recent) if recent and draw > 0.65 else self._fact(line)
        return (first, second) if rng.random() < 0.5 else (second, first)

    def _fact(self, line: int) -> str:
        return self.rng.choice(self.late if line > LATE * len(self.results) else self.early or self.late)

    def _appoint(self, line: int, recent: list[str]) -> None:
        """Let recent results take the places of milestones whose time is over."""
        self.alive = [each for each in self.alive if each.until > line]
        names = [name for name in recent if name not in {each.name for each in self.alive}]
        while names and len(self.alive) < MILESTONES:
            name = names.pop(self.rng.randrange(len(names)))
            self.alive.append(_Milestone(name, line + self.rng.randint(*LIFE), line))
            self.milestones.append(self.alive[-1])


def make_problem(rng: random.Random, *, steps: int = STEPS, facts: int = FACTS) -> Problem:
    """A problem of ``rng`` alone: ``steps`` definitions, and ``facts`` facts.

    Its prompt has 1 + 2 * facts + 4 * steps characters, its output LINE * steps; tokens are one more each, for
    ``<bos>`` and ``<eos>``.

    Raises:
        ValueError: there are not so many names, or no step or no fact is asked for.
    """
    if steps < 1 or facts < 1 or steps + facts > len(NAMES):
        raise ValueError(f"a problem has at least one step and one fact, and {len(NAMES)} in all, not {steps + facts}")
    names = rng.sample(NAMES, steps + facts)
    given, results = names[:facts], names[facts:]
    value = {name: rng.randrange(len(DIGITS)) for name in given}
    author = _Author(rng, results, given)
    definitions = tuple(Definition(name, *author.operands(line)) for line, name in enumerate(results))
    return Problem(
        facts=tuple((name, value[name]) for name in rng.sample(given, facts)),
        definitions=definitions,
        milestones=tuple((each.name, each.used) for each in author.milestones),
        phoenixes=tuple(author.late),
    )
