"""Several numbers under names of their own, said in one text and asked for in another order."""

from __future__ import annotations

import random
from collections.abc import Mapping

from kvpolicy.lab.tasks.base import Item, Task, first_said, places
from kvpolicy.lab.tasks.wording import digits, hide

NAMES = (
    *("Amber", "Birch", "Cedar", "Daisy", "Ember", "Fern", "Ginger", "Hazel", "Iris", "Juniper", "Kiwi", "Laurel"),
    *("Maple", "Nutmeg", "Olive", "Poppy", "Quince", "Rosemary", "Saffron", "Thyme", "Violet", "Willow", "Yarrow"),
)
COUNT = 8
"""Names that have a number; half of them are asked for."""


class Needles(Task):
    name = "needles"
    summary = f"{COUNT} numbers under names in a long text; {COUNT // 2} of them asked for, in another order"
    least = 120

    def item(self, number: int, rng: random.Random, size: int) -> Item:
        names = rng.sample(NAMES, COUNT)
        code = dict(zip(names, digits(COUNT, rng), strict=True))
        facts = {name: f"The code of {name} is {code[name]}." for name in names}
        asked = rng.sample(names, COUNT // 2)
        prompt = (
            "There are codes hidden in the text below. Remember them; you will be asked for some.\n\n"
            f"{hide(list(facts.values()), size - 60, rng)}\n\n"
            "Write the codes of the names below, each on a line of its own, as the name, a colon, and the code.\n"
            f"Names: {', '.join(asked)}\nCodes:\n"
        )
        answers = tuple(code[name] for name in asked)
        return Item(self.name, number, prompt, answers, tuple(asked), places(prompt, [facts[name] for name in asked]))

    def said(self, item: Item, output: str) -> Mapping[str, str]:
        return first_said(item.names, r"\d(?:[\d,]*\d)?", output)

    def new_tokens(self, item: Item) -> int:
        return 24 + 20 * len(item.answers)


TASK = Needles()
