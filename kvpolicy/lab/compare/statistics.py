"""What scores are worth: intervals over items, and tests that pair the same items under two caches.

Answers of one item are no independent draws: they share a prompt, and one that goes astray takes others with it. So the
item is what is drawn, everywhere here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

Z = 1.959963984540054
"""Standard deviations to each side that hold 95 % of a normal distribution."""

EXACT = 12
"""Up to so many items that differ, all ways to swap them are tried; beyond, DRAWS of them, always the same."""

DRAWS = 20_000


@dataclass(frozen=True)
class Interval:
    """A share and where the true one lies, 95 times of a hundred; all from 0 to 1."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """One arm against another on the same items: the mean difference of their shares, and how likely one at least so
    large is where the two are alike (two-sided)."""

    difference: float
    p: float
    items: int


def interval(items: Sequence[tuple[int, int]]) -> Interval:
    """The share of right answers, from (right, asked) of each item.

    Wilson's interval for as many answers as these are worth: their number over the design effect of drawing whole items
    (Kish), never less than the number of items. Where every item has one answer it is Wilson's own.

    Raises:
        ValueError: there are no answers.
    """
    right, asked = sum(item[0] for item in items), sum(item[1] for item in items)
    if not asked:
        raise ValueError("no answers to take a share of")
    share = right / asked
    worth = _worth(items, share, asked)
    middle = (share + Z**2 / (2 * worth)) / (1 + Z**2 / worth)
    half = Z / (1 + Z**2 / worth) * math.sqrt(share * (1 - share) / worth + Z**2 / (4 * worth**2))
    return Interval(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def _worth(items: Sequence[tuple[int, int]], share: float, asked: int) -> float:
    """As many independent answers would say as much."""
    count = len(items)
    alone = share * (1 - share) / asked
    if count < 2 or not alone:
        return count
    spread = sum((right - share * each) ** 2 for right, each in items) * count / (count - 1) / asked**2
    return min(asked, max(count, asked * alone / spread)) if spread else asked


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """The test of signs swapped at random: were both alike, each item's difference could as well have the other.

    Args:
        ours, theirs: shares of the same items, in the same order.

    Raises:
        ValueError: they are not as many, or none.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} items cannot be paired")
    differences = np.array(ours, dtype=float) - np.array(theirs, dtype=float)
    mean = float(differences.mean())
    moved = differences[differences != 0]
    if not len(moved):
        return Paired(0.0, 1.0, len(ours))
    least = abs(moved.sum()) - 1e-9  # sums of the same numbers in another order may differ in the last bit
    as_large = np.abs(_signs(len(moved)) @ moved) >= least
    p = float(as_large.mean()) if len(moved) <= EXACT else (1 + int(as_large.sum())) / (1 + DRAWS)
    return Paired(mean, p, len(ours))


@cache
def _signs(count: int) -> np.ndarray:
    """Ways to give so many numbers signs [ways, count]: all of them, or DRAWS."""
    if count <= EXACT:
        return np.array(list(product((-1, 1), repeat=count)), dtype=float)
    return np.random.default_rng(0).integers(0, 2, (DRAWS, count)) * 2.0 - 1


def holm(values: Sequence[float]) -> list[float]:
    """p-values of several tests, each raised so that together they are wrong as seldom as one alone (Holm)."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    raised, worst = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - rank) * values[place]))
        raised[place] = worst
    return raised


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, gain), whether none costs as little and gains as much, and one of both better."""
    return [
        not any(other[0] <= cost and other[1] >= gain and other != (cost, gain) for other in points)
        for cost, gain in points
    ]
