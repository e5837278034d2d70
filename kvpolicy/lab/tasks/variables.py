"""Variables that are given to variables: the value of a chain's last one stands only at the chain's beginning."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise

from kvpolicy.lab.tasks.base import Item, Task, first_said, places
from kvpolicy.lab.tasks.wording import digits, hide, made_names

CHAINS, LINKS = 3, 3
"""Chains in a prompt, and variables in each."""


class Variables(Task):
    name = "variables"
    summary = f"{CHAINS} chains of {LINKS} variables, each given to the next; the value of the last is asked for"
    least = 120

    def item(self, number: int, rng: random.Random, size: int) -> Item:
        values = digits(CHAINS, rng)
        names = made_names(CHAINS * LINKS, rng)
        chains = [names[start : start + LINKS] for start in range(0, len(names), LINKS)]
        facts = [
            [f"{chain[0]} = {value}."] + [f"{name} = {before}." for before, name in pairwise(chain)]
            for chain, value in zip(chains, values, strict=True)
        ]
        order = _merged(facts, rng)
        asked = {chain[-1]: value for chain, value in zip(chains, values, strict=True)}
        last = rng.sample(list(asked), CHAINS)
        prompt = (
            "Variables are set in the text below, some to numbers and some to other variables. Keep track of them.\n\n"
            f"{hide(order, size - 60, rng, ordered=True)}\n\n"
            "Write the number that each variable below has in the end, each on a line of its own, as the variable, an "
            f"equals sign, and the number.\nVariables: {', '.join(last)}\nNumbers:\n"
        )
        roots = {chain[-1]: told[0] for chain, told in zip(chains, facts, strict=True)}
        answers = tuple(asked[name] for name in last)
        return Item(self.name, number, prompt, answers, tuple(last), places(prompt, [roots[name] for name in last]))

    def said(self, item: Item, output: str) -> Mapping[str, str]:
        return first_said(item.names, r"\d(?:[\d,]*\d)?", output)

    def new_tokens(self, item: Item) -> int:
        return 24 + 24 * len(item.answers)


def _merged(chains: list[list[str]], rng: random.Random) -> list[str]:
    """All of them in one row, each chain in its own order."""
    turns = [number for number, chain in enumerate(chains) for _ in chain]
    rng.shuffle(turns)
    waiting = [iter(chain) for chain in chains]
    return [next(waiting[turn]) for turn in turns]


TASK = Variables()
