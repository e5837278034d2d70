"""The chains of sums of `builtin:reasoner` in English, for models that talk: each result is worked out on a line.

As there, some results are needed again and again for a while, and some facts only late in the output; to every model
that writes its steps down these are the milestones and phoenixes of RaaS (arXiv:2502.11147).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from kvpolicy.lab.tasks.base import Item, Task, places
from kvpolicy.lab.tasks.wording import made_names
from kvpolicy.models.reasoner.problem import make_problem

FACTS = 6
AROUND = 116 + 3 * FACTS
"""Words of a prompt beside the definitions, of which each has five."""

EXAMPLE = """\
ANNE = 7.
BERT = 5.

CARL = ANNE + BERT.
DORA = CARL + CARL.

CARL = ANNE + BERT = 7 + 5 = 2
DORA = CARL + CARL = 2 + 2 = 4
"""


class Worksheet(Task):
    name = "worksheet"
    summary = "a chain of sums in English, each result worked out on a line of one long output; some are used late"
    size, least, most = AROUND + 5 * 24, AROUND + 5 * 2, AROUND + 5 * 46

    def item(self, number: int, rng: random.Random, size: int) -> Item:
        problem = make_problem(rng, steps=(size - AROUND) // 5, facts=FACTS)
        called = dict(zip(problem.value, made_names(len(problem.value), rng), strict=True))
        facts = [f"{called[name]} = {value}." for name, value in problem.facts]
        defined = [f"{called[name]} = {called[one]} + {called[two]}." for name, one, two in problem.definitions]
        names = tuple(called[each.name] for each in problem.definitions)
        prompt = (
            "Work out every sum below, in the order given, each on a line of its own. Keep only the last digit of a "
            "sum: 7 + 5 = 2. On each line write the name, the two names that are added, their two numbers, and the "
            f"last digit, and nothing else, in the form of this example:\n\n{EXAMPLE}\nNow these numbers are given:\n\n"
            + "\n".join(facts)
            + "\n\nand these sums are to be worked out:\n\n"
            + "\n".join(defined)
            + f"\n\nWrite all {len(names)} lines, from {names[0]} to {names[-1]}.\n"
        )
        values = tuple(str(problem.value[each.name]) for each in problem.definitions)
        return Item(self.name, number, prompt, values, names, places(prompt, defined), lead=f"\n{names[0]} =")

    def said(self, item: Item, output: str) -> Mapping[str, str]:
        """Of each line that begins with a name, the number at its end; of two for one name, the first."""
        found: dict[str, str] = {}
        known = {name.lower(): name for name in item.names}
        for line in self._begun(item, output).splitlines():
            match = re.match(r"\W*(\w+)\W*=.*?(\d+)\W*\Z", line)
            if match and (name := known.get(match[1].lower())):
                found.setdefault(name, match[2])
        return found

    def _begun(self, item: Item, output: str) -> str:
        """With the lead, where a model was given it and goes on from there."""
        return output if re.match(r"\W*[A-Za-z]+\W*=", output) else f"{item.lead.strip()} {output}"

    def new_tokens(self, item: Item) -> int:
        return 48 + 32 * len(item.answers)


TASK = Worksheet()
