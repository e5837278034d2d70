"""English for prompts: sentences that say nothing anybody asks for, with facts somewhere among them."""

from __future__ import annotations

import random
from collections.abc import Sequence

THINGS = (
    *("river", "stone", "lamp", "cloud", "garden", "window", "letter", "basket", "bridge", "candle", "carpet", "clock"),
    *("coat", "field", "fence", "flower", "forest", "hammer", "hill", "horse", "island", "jacket", "kettle", "ladder"),
    *("lake", "market", "meadow", "mirror", "mountain", "orchard", "painting", "path", "piano", "pillow", "pocket"),
    *("road", "roof", "sail", "shelf", "spoon", "table", "teapot", "tower", "train", "tree", "valley", "village"),
)
LOOKS = (
    *("quiet", "old", "bright", "narrow", "round", "heavy", "gentle", "green", "little", "long", "pale", "plain"),
    *("soft", "tall", "warm", "white", "wide", "wooden", "yellow", "simple"),
)
DOES = ("stands near", "belongs to", "lies behind", "leads past", "looks like", "faces", "came before", "waits by")
WHEN = (
    *(
        "in the morning",
        "at noon",
        "after the rain",
        "in early spring",
        "before winter",
        "most evenings",
        "now and then",
    ),
    *("on market days", "as always", "for a while"),
)
"""Nothing in these has a digit, or is a name that a task gives."""

CONSONANTS, VOWELS = "BDFGKLMNPRTVZ", "AEIOU"


def sentence(rng: random.Random) -> str:
    """One that says nothing of use."""
    words = (rng.choice(LOOKS), rng.choice(THINGS), rng.choice(DOES), rng.choice(LOOKS), rng.choice(THINGS))
    return "The {} {} {} the {} {} {}.".format(*words, rng.choice(WHEN))


def hide(facts: Sequence[str], words: int, rng: random.Random, *, ordered: bool = False) -> str:
    """Facts among so many words of other sentences, each at a place drawn evenly.

    Args:
        words: of the text in all.
        ordered: the facts stay in the order given.
    """
    said = list(facts)
    if not ordered:
        rng.shuffle(said)
    left = max(0, words - sum(len(fact.split()) for fact in facts))
    rest: list[str] = []
    while left > 0:
        rest.append(sentence(rng))
        left -= len(rest[-1].split())
    at = sorted(rng.randrange(len(rest) + 1) for _ in said)
    text: list[str] = []
    for number, other in enumerate([*rest, ""]):
        while at and at[0] == number:
            at.pop(0)
            text.append(said.pop(0))
        text.append(other)
    return " ".join(filter(None, text))


def digits(count: int, rng: random.Random, length: int = 5) -> list[str]:
    """Different numbers of so many digits, as text."""
    return [str(number) for number in rng.sample(range(10 ** (length - 1), 10**length), count)]


def made_names(count: int, rng: random.Random) -> list[str]:
    """Different words of five letters that nobody else uses."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(kind) for kind in (CONSONANTS, VOWELS, CONSONANTS, VOWELS, CONSONANTS))] = None
    return list(found)
