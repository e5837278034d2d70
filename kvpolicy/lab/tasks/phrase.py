"""The task that `builtin:tiny` was trained on: hear a phrase amid humming, then say it over and over.

Each word of a phrase occurs in it once, so what is asked for has a name: the word that follows "owl" when it is said
for the third time. A word that is left out or said twice makes the words after it no worse.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from kvpolicy.lab.tasks.base import Item, Task
from kvpolicy.models.tiny.task import make_problem

WORDS = 12
"""Of a phrase."""

ROUNDS = 4
"""How often it is to be said."""


class Phrase(Task):
    name = "phrase"
    summary = "a phrase heard once amid humming, to be said over and over; what builtin:tiny was trained on"
    size, least, most = 78, WORDS + 3, 254  # it was trained on as many

    def item(self, number: int, rng: random.Random, size: int) -> Item:
        problem = make_problem(rng.randrange(2**32), words=WORDS, hums=size - WORDS - 1)
        turns = [(word, turn) for turn in range(1, ROUNDS + 1) for word in problem.phrase]
        place = {word: problem.prompt.split().index(word) / len(problem.prompt.split()) for word in problem.phrase}
        follows = dict(zip(problem.phrase, (*problem.phrase[1:], problem.phrase[0]), strict=True))
        return Item(
            self.name,
            number,
            problem.prompt,
            tuple(follows[word] for word, _ in turns),
            tuple(f"{word} {turn}" for word, turn in turns),
            tuple(place[follows[word]] for word, _ in turns),
        )

    def said(self, item: Item, output: str) -> Mapping[str, str]:
        """What follows each word, by how often it was said; the prompt's last word is the first."""
        often: Counter[str] = Counter()
        found: dict[str, str] = {}
        for word, follower in pairwise([item.prompt.split()[-1], *output.split()]):
            often[word] += 1
            found[f"{word} {often[word]}"] = follower
        return found

    def spoken(self, output: str, cut: bool) -> str:
        """All of it: a word is one token, so none is ever half."""
        return super().spoken(output, cut=False)

    def new_tokens(self, item: Item) -> int:
        return len(item.answers)

    def period(self, item: Item) -> int:
        return WORDS


TASK = Phrase()
