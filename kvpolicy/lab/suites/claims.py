"""What papers claim, judged by numbers measured here, by a rule that is the same for all of them.

A claim is about the difference of two shares of right answers on the same items. It *holds* where the whole 95 %
interval of that difference lies on the claim's side, *does not hold* where all of it lies on the other, and *cannot be
told* where it lies across. What cannot be measured, since the full cache itself fails, cannot be told either.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import mean, stdev

from kvpolicy.lab.compare.statistics import Z

POINTS = 0.03
"""A score that is no further below the full cache's is as good: of some hundred answers less says nothing."""


class Word(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "cannot be told"


class Kind(StrEnum):
    """Where the difference is said to lie: ``points`` or less below 0, above 0, or more than ``points`` below 0."""

    NEAR = "near"
    ABOVE = "above"
    BELOW = "below"


@dataclass(frozen=True)
class Spread:
    """A mean difference of shares, and where the true one lies, 95 times of a hundred; of ``items`` pairs."""

    difference: float
    low: float
    high: float
    items: int

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


@dataclass(frozen=True)
class Finding:
    """A claim and what came of it. ``says``: the claim, in a few words; ``where``: what it was judged by."""

    says: str
    word: Word
    where: str

    def __str__(self) -> str:
        return f"{self.says}: {self.word}. {self.where}"


def spread(ours: Sequence[float], theirs: Sequence[float], answers: int) -> Spread:
    """The mean difference of items' shares, with Student's interval.

    Where all items differ alike the interval would have no width; it is never narrower than if one answer of one item
    had been different.

    Args:
        answers: of an item, on average.

    Raises:
        ValueError: there are not as many, or fewer than two.
    """
    differences = [our - their for our, their in zip(ours, theirs, strict=True)]
    count = len(differences)
    if count < 2:
        raise ValueError(f"{count} items say nothing of how items differ")
    one = 1 / max(1, answers) / math.sqrt(count)
    half = _student(count - 1) * max(stdev(differences), one) / math.sqrt(count)
    middle = mean(differences)
    return Spread(middle, max(-1.0, middle - half), min(1.0, middle + half), count)


def _student(freedom: int) -> float:
    """Standard errors to each side that hold 95 %: Student's t, by the first terms of its expansion around the normal
    (Abramowitz and Stegun 26.7.5), 1 % off at 4 degrees of freedom."""
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


def judge(kind: Kind, found: Spread, points: float = POINTS) -> Word:
    """What one difference says of a claim of this kind."""
    if kind is Kind.ABOVE:
        return Word.HOLDS if found.low > 0 else Word.FAILS if found.high <= 0 else Word.OPEN
    if kind is Kind.NEAR:
        return Word.HOLDS if found.low >= -points else Word.FAILS if found.high < -points else Word.OPEN
    return Word.HOLDS if found.high < -points else Word.FAILS if found.low >= -points else Word.OPEN


def all_of(words: Sequence[Word]) -> Word:
    """What several places say of a claim about each of them."""
    if not words:
        return Word.OPEN
    if Word.FAILS in words:
        return Word.FAILS
    return Word.OPEN if Word.OPEN in words else Word.HOLDS


def any_of(words: Sequence[Word]) -> Word:
    """What several places say of a claim about some of them."""
    if Word.HOLDS in words:
        return Word.HOLDS
    return Word.OPEN if Word.OPEN in words or not words else Word.FAILS


def counted(words: Sequence[Word], unit: str) -> str:
    """`holds at 3 of 5 budgets, cannot be told at 2`."""
    often = Counter(words)
    told = [f"{word} at {often[word]}" for word in Word if often[word]]
    return ", ".join(told) + f" of {len(words)} {unit}"
