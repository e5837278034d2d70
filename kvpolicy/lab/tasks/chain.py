"""The task that `builtin:reasoner` was trained on: a chain of sums, worked out line by line in a long output.

Every result is asked for by its name. Some are needed again long after they were written, and so are some facts of the
prompt (``kvpolicy/models/reasoner/problem.py`` says which): a policy that drops one of these cannot be right by chance
more often than once in ten.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from kvpolicy.lab.tasks.base import Item, Task, places
from kvpolicy.models.reasoner.problem import FACTS, LINE, STEPS, make_problem

AROUND = 1 + 2 * FACTS
"""Characters of a prompt beside the definitions, of which each has four."""


class Chain(Task):
    name = "chain"
    summary = "a chain of sums worked out line by line, each result by its name; what builtin:reasoner was trained on"
    size, least, most = AROUND + 4 * STEPS, AROUND + 4 * 2, AROUND + 4 * 36  # it was trained on as many

    def item(self, number: int, rng: random.Random, size: int) -> Item:
        problem = make_problem(rng, steps=(size - AROUND) // 4)
        prompt, names = problem.prompt, tuple(each.name for each in problem.definitions)
        values = tuple(str(problem.value[name]) for name in names)
        return Item(self.name, number, prompt, values, names, places(prompt, [f">{name}" for name in names]))

    def said(self, item: Item, output: str) -> Mapping[str, str]:
        """Of each name, the first result that is written at the end of a line."""
        found: dict[str, str] = {}
        for name, value in re.findall(r":([A-Za-z])(\d)", output):
            found.setdefault(name, value)
        return found

    def spoken(self, output: str, cut: bool) -> str:
        """All of it: a result is one token, so none is ever half."""
        return super().spoken(output, cut=False)

    def words(self, output: str) -> Sequence[str]:
        """Its characters, which are its tokens."""
        return output

    def new_tokens(self, item: Item) -> int:
        """Room for some lines that are written twice."""
        return LINE * (len(item.answers) + 4)


TASK = Chain()
