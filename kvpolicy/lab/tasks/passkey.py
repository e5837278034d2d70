"""One number, said once somewhere in a text that does not matter, and asked for at its end."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from kvpolicy.lab.tasks.base import Item, Task, places, plain
from kvpolicy.lab.tasks.wording import digits, hide

NAME = "pass key"


class Passkey(Task):
    name = "passkey"
    summary = "a number said once in a long text, asked for at the end"
    least = 60

    def item(self, number: int, rng: random.Random, size: int) -> Item:
        (key,) = digits(1, rng)
        fact = f"The pass key is {key}. Remember it: {key} is the pass key."
        prompt = (
            "There is a pass key hidden in the text below. Find it and remember it; you will be asked for it.\n\n"
            f"{hide([fact], size - 36, rng)}\n\nWhat is the pass key?"
        )
        return Item(self.name, number, prompt, (key,), (NAME,), places(prompt, [fact]), lead=" The pass key is")

    def said(self, item: Item, output: str) -> Mapping[str, str]:
        """The first number: nothing else was asked for."""
        found = re.search(r"(?<!\w)\d(?:[\d,]*\d)?(?!\w)", output)
        return {NAME: plain(found[0])} if found else {}

    def new_tokens(self, item: Item) -> int:
        return 24


TASK = Passkey()
