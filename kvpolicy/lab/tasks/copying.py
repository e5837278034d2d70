"""A list of numbered lines, to be written again: all of the prompt matters, each part once, the last part late."""

from __future__ import annotations

import random
from collections.abc import Mapping

from kvpolicy.lab.tasks.base import Item, Task, first_said, places
from kvpolicy.lab.tasks.wording import LOOKS, THINGS

WORDS = 4
"""Of a line, beside its number."""


class Copying(Task):
    name = "copy"
    summary = f"numbered lines of {WORDS} words, to be written again word for word"
    size, least = 160, 30

    def item(self, number: int, rng: random.Random, size: int) -> Item:
        names = tuple(str(line) for line in range(1, 1 + max(1, (size - 25) // (WORDS + 1))))
        answers = tuple(" ".join(rng.choices((*LOOKS, *THINGS), k=WORDS)) for _ in names)
        lines = [f"{name}: {answer}\n" for name, answer in zip(names, answers, strict=True)]
        prompt = (
            "Copy the numbered lines below, word for word, with their numbers, and write nothing else.\n\n"
            f"{''.join(lines)}\nThe same lines again:\n"
        )
        return Item(self.name, number, prompt, answers, names, places(prompt, [f"\n{line}" for line in lines]))

    def said(self, item: Item, output: str) -> Mapping[str, str]:
        """A line is all words on it that follow its number."""
        return first_said(item.names, r"[a-z]+(?: +[a-z]+)*", output)

    def new_tokens(self, item: Item) -> int:
        return 32 + 12 * len(item.answers)


TASK = Copying()
