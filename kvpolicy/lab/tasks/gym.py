"""Problems of reasoning-gym, verified by its own checkers: ``gym:chain_sum`` is its data set chain_sum.

Several problems of one data set go into one prompt, as many as its words allow, and are answered in one long output.
The extra `reasoning` brings the package; without it the names are known and nothing else.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from typing import Any

from kvpolicy.errors import MissingExtra, UsageError
from kvpolicy.lab.tasks.base import Item, Task, places

PREFIX = "gym:"

MOST = 64
"""Problems of a prompt, at the most."""


@dataclass(frozen=True)
class Problems(Item):
    """``entries``: what the data set gave for each answer; its checker asks for it."""

    entries: tuple[dict[str, Any], ...] = ()


class Gym(Task):
    """A data set by its name in reasoning-gym.

    Raises:
        MissingExtra: the package is not installed.
        UsageError: it has no such data set.
    """

    size, least = 300, 40

    def __init__(self, dataset: str) -> None:
        self.name, self.dataset = f"{PREFIX}{dataset}", dataset
        self.summary = f"problems of reasoning-gym's {dataset}, answered in one output, each under its number"
        known = _package().factory.DATASETS
        if dataset not in known:
            near = get_close_matches(dataset, known, 1)
            hint = f"did you mean {PREFIX}{near[0]}?" if near else f"it has {len(known)}, {PREFIX}chain_sum among them"
            raise UsageError(f"--tasks {self.name}: reasoning-gym has no data set {dataset!r}; {hint}")

    def item(self, number: int, rng: random.Random, size: int) -> Item:
        drawn = _package().create_dataset(self.dataset, seed=rng.randrange(2**31), size=MOST)
        entries: list[dict[str, Any]] = []
        words = 45
        for entry in drawn:
            words += 1 + len(entry["question"].split())
            if entries and words > size:
                break
            entries.append(entry)
        names = tuple(str(place) for place in range(1, 1 + len(entries)))
        asked = [f"Question_{name}:\n{entry['question']}\n" for name, entry in zip(names, entries, strict=True)]
        prompt = (
            "Answer each question. Begin each answer with 'Answer_' and the number of its question, and end it with a "
            "line 'The answer is', followed by the answer alone.\n\n"
            + "\n".join(asked)
            + f"\nAnswer all {len(names)}, from Answer_1 to Answer_{names[-1]}.\n"
        )
        answers = tuple(str(entry["answer"]) for entry in entries)
        return Problems(self.name, number, prompt, answers, names, places(prompt, asked), entries=tuple(entries))

    def said(self, item: Item, output: str) -> Mapping[str, str]:
        """Of each number, what follows "The answer is" on its line, or the part's only line."""
        heads = list(re.finditer(r"(?<!\w)Answer[ _#]*(\d+)(?!\w|\.\d)[:.]?", output, re.IGNORECASE))
        ends = [*(head.start() for head in heads[1:]), len(output)]
        found: dict[str, str] = {}
        for head, end in zip(heads, ends, strict=False):  # without any head there is nothing to end
            part = output[head.end() : end].strip()
            value = re.search(r"answer\s+is\s*:?\s*(.+)", part, re.IGNORECASE)
            if head[1] in item.names and (value or (part and "\n" not in part)):
                found.setdefault(head[1], (value[1] if value else part).strip().rstrip("."))
        return found

    def grade(self, item: Item, output: str, *, cut: bool = False) -> tuple[bool, ...]:
        """By the data set's own checker: an answer counts where it is given full marks."""
        said = self.said(item, self.spoken(output, cut))
        entries = item.entries if isinstance(item, Problems) else ()
        checker = _checker(self.dataset)
        return tuple(
            name in said and checker.score_answer(said[name], entry) == 1.0
            for name, entry in zip(item.names, entries, strict=True)
        )

    def new_tokens(self, item: Item) -> int:
        return 64 + 96 * len(item.answers)


@cache
def gym_task(name: str) -> Task:
    """The task of a name that begins with ``PREFIX``; raises as ``Gym`` does."""
    return Gym(name.removeprefix(PREFIX))


@cache
def _checker(dataset: str) -> Any:
    return _package().create_dataset(dataset, seed=0, size=1)


def _package() -> Any:
    if find_spec("reasoning_gym") is None:
        raise MissingExtra("tasks of reasoning-gym need its package; `pip install 'kvpolicy[reasoning]'` brings it")
    import reasoning_gym

    return reasoning_gym
