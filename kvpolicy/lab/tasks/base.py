"""What a task is: items made from a seed, and an exact grade for every answer that an item asks for.

An answer is found in an output by its own name, never by its place in a row of answers: one that is left out must not
make all later ones wrong. The first thing that is said of a name counts, so that nobody is right by saying everything.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvpolicy.errors import UsageError

THOUGHT = "</think>"
"""What ends the part of an output in which some models think aloud; only what follows is graded."""


@dataclass(frozen=True)
class Item:
    """One prompt and what is to be answered.

    Attributes:
        task, number: whose item it is, and which, from 0.
        prompt: the text that the model reads. lead: how the answer begins; only a model without a chat template is
            given it, after the prompt: one that talks answers the bare question better.
        answers: the parts asked for, in the order in which they are asked for; each is scored by itself.
        names: by which each answer is found in an output; as many, all different.
        about: where in the prompt stands what each answer needs, as a share of its characters, 0 to 1.
    """

    task: str
    number: int
    prompt: str
    answers: tuple[str, ...]
    names: tuple[str, ...]
    about: tuple[float, ...]
    lead: str = ""

    def __post_init__(self) -> None:
        if not len(self.answers) == len(self.names) == len(self.about) == len(set(self.names)) > 0:
            raise ValueError(f"item {self.number} of {self.task} needs answers, each with one name and one place")


class Task(ABC):
    """A kind of item. ``size`` is the number of words of its prompts unless another is asked for, ``least`` the fewest
    that hold an item, ``most`` the most, None: any number; prompts are that long but for a sentence."""

    name: str
    summary: str
    size: int = 400
    least: int = 100
    most: int | None = None

    def make(self, count: int, seed: int, size: int | None = None) -> list[Item]:
        """``count`` items; equal arguments give equal items on every machine, whatever else it runs.

        Args:
            size: words of a prompt, about; None: the task's own.

        Raises:
            UsageError: an item does not fit into so few words, or cannot fill so many.
        """
        words = self.size if size is None else size
        if words < self.least:
            raise UsageError(f"the task {self.name} needs prompts of at least {self.least} words, not {words}")
        if self.most is not None and words > self.most:
            raise UsageError(f"the task {self.name} has prompts of {self.most} words at the most, not {words}")
        return [
            self.item(number, random.Random(f"kvpolicy {self.name} {seed} {words} {number}"), words)
            for number in range(count)
        ]

    @abstractmethod
    def item(self, number: int, rng: random.Random, size: int) -> Item:
        """One item, of ``rng`` alone."""

    @abstractmethod
    def said(self, item: Item, output: str) -> Mapping[str, str]:
        """By name, what an output says of it; names of which it says nothing are left out."""

    @abstractmethod
    def new_tokens(self, item: Item) -> int:
        """Tokens that are enough for a right output and some words around it."""

    def grade(self, item: Item, output: str, *, cut: bool = False) -> tuple[bool, ...]:
        """For each answer, whether the output gives it.

        Args:
            cut: the output was ended by a limit, so its last word may be half a word: it counts for nothing.
        """
        said = self.said(item, self.spoken(output, cut))
        return tuple(said.get(name) == answer for name, answer in zip(item.names, item.answers, strict=True))

    def finished(self, item: Item, output: str, *, cut: bool = False) -> bool:
        """Whether the output says something, right or wrong, of all that it was asked for."""
        return set(item.names) <= set(self.said(item, self.spoken(output, cut)))

    def period(self, item: Item) -> int:
        """Words after which a right output says the same again; 0: it never does. Any other period is a loop."""
        return 0

    def words(self, output: str) -> Sequence[str]:
        """The words of an output, among which loops are looked for."""
        return output.split()

    def spoken(self, output: str, cut: bool) -> str:
        """The part of an output that is graded: after any thinking aloud, and without a last word that may be half."""
        text = output.rpartition(THOUGHT)[2]
        return re.sub(r"[\w.,]*\Z", "", text) if cut else text


def first_said(names: Iterable[str], value: str, output: str) -> dict[str, str]:
    """By name, the first value that follows it before another name does.

    Args:
        names: words, matched whole, whatever the case.
        value: a regular expression without groups.
    """
    known = {name.lower(): name for name in names}
    words = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    found: dict[str, str] = {}
    current: str | None = None
    for match in re.finditer(rf"(?<!\w)(?:(?P<name>{words})|(?P<value>{value}))(?!\w)", output, re.IGNORECASE):
        if match["name"] is not None:
            current = known[match["name"].lower()]
        elif current is not None:
            found.setdefault(current, plain(match["value"]))
            current = None
    return found


def plain(value: str) -> str:
    """A value as answers are written: lower case, and no commas between the digits of a number."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", value.strip()).lower()


def places(prompt: str, facts: Sequence[str]) -> tuple[float, ...]:
    """Where in a prompt each fact begins, as a share of its characters.

    Raises:
        ValueError: one does not stand there once.
    """
    for fact in facts:
        if prompt.count(fact) != 1:
            raise ValueError(f"{fact!r} stands {prompt.count(fact)} times in its prompt")
    return tuple(prompt.index(fact) / len(prompt) for fact in facts)
