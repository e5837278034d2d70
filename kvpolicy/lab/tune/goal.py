"""What is asked of a tuned policy, which candidates are promising for that, and which one it is in the end."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvpolicy.lab.tune.candidates import Candidate
from kvpolicy.lab.tune.measured import Measured
from kvpolicy.lab.tune.traced import Kept

NEAR = 1.04
"""Two memories of which one is no more than so many times the other are not told apart any further."""

WORTH = 1.5
"""A candidate whose error is more than so many times the largest with which one agreed well enough is not run."""

LESS, ATTEMPTS = 0.85, 3
"""Where nothing is left that is worth a run, so often more of this share of the best memory are drawn."""


@dataclass
class Tried:
    """A candidate and what is known of it; ``refused``: why the model could not run it."""

    candidate: Candidate
    kept: Kept | None = None
    measured: Measured | None = None
    refused: str = ""

    @property
    def bytes(self) -> int:
        return self.candidate.bytes

    @property
    def promise(self) -> float:
        """The lower, the better it was on recorded attention; where nothing was recorded, all are alike."""
        return 0.0 if self.kept is None else self.kept.error

    @property
    def found(self) -> Measured:
        assert self.measured is not None
        return self.measured


@dataclass(frozen=True)
class Goal:
    """Either the best agreement within ``memory`` bytes, or the least memory with this ``agreement``."""

    memory: int | None = None
    agreement: float | None = None

    def fits(self, tried: Tried) -> bool:
        """Of what was measured, whether it is what was asked for."""
        if self.memory is not None:
            return tried.bytes <= self.memory
        assert self.agreement is not None
        return tried.found.agreement.value >= self.agreement

    def chosen(self, measured: Sequence[Tried]) -> Tried | None:
        """The best of what fits; None where nothing does."""
        fitting = [tried for tried in measured if self.fits(tried)]
        if self.memory is not None:
            return max(fitting, key=_closeness, default=None)
        return min(fitting, key=lambda tried: (tried.bytes, *(-number for number in _closeness(tried))), default=None)


def _closeness(tried: Tried) -> tuple[float, float, int]:
    return tried.found.agreement.value, -tried.found.kl.value, -tried.bytes


def front(measured: Sequence[Tried]) -> list[Tried]:
    """Those for which no other agrees at least as well in less memory, or better in as much; by memory."""
    kept: list[Tried] = []
    for tried in sorted(measured, key=lambda tried: (tried.bytes, *(-number for number in _closeness(tried)))):
        if not kept or tried.found.agreement.value > kept[-1].found.agreement.value:
            kept.append(tried)
    return kept


More = Callable[[int], Sequence[Tried]]
"""New candidates of at most so many bytes, which are then among those that were tried; none where no trial is left."""


def to_measure(
    goal: Goal, tried: Sequence[Tried], first: Sequence[Tried], count: int, seed: int, more: More = lambda target: ()
) -> Iterator[Tried]:
    """Which candidates the model should run, one after another; what has been measured of the earlier ones is read when
    the next is asked for.

    With a memory: ``first``, the most promising, and a quarter drawn from the rest, so that one can see what the
    promise was worth. With an agreement: the most promising of each memory is tried by halving, from what fits
    downwards and from what does not upwards. Where nothing is left in between, ``more`` of half way are asked for, and
    in the end the most promising below the best so far, and more of these, for what failed there may have been a bad
    draw.
    """
    if goal.memory is not None:
        yield from _promising(tried, first, count, seed)
    else:
        yield from _halving(goal, tried, count, more)


def _promising(tried: Sequence[Tried], first: Sequence[Tried], count: int, seed: int) -> Iterator[Tried]:
    by_promise = sorted(tried, key=lambda each: (each.promise, each.candidate.number))
    chosen = [*first]
    for each in by_promise:
        if len(chosen) >= count - count // 4:
            break
        if each not in chosen:
            chosen.append(each)
    rest = [each for each in tried if each not in chosen]
    rng = random.Random(f"kvpolicy tune, what is measured {seed}")
    yield from chosen
    yield from rng.sample(rest, min(len(rest), max(0, count - len(chosen))))


def _halving(goal: Goal, tried: Sequence[Tried], count: int, more: More) -> Iterator[Tried]:
    for _ in range(count):
        done = [each for each in tried if each.measured is not None]
        fitting = [each for each in done if goal.fits(each)]
        best = min((each.bytes for each in fitting), default=max(each.bytes for each in tried) + 1)
        failed = max((each.bytes for each in done if not goal.fits(each) and each.bytes < best), default=0)
        between = _open(tried, failed, best)
        if not between and failed and best > NEAR * failed:
            between = _open(more(round(math.sqrt(failed * best))), failed, best)
        if between:
            yield _middle(between)
            continue
        worth = WORTH * max((each.promise for each in fitting), default=math.inf)
        below = _promising_below(_open(tried, 0, best), worth)
        for _ in range(ATTEMPTS):
            below = below or _promising_below(_open(more(round(LESS * best)), 0, best), worth)
        if not below:
            return
        yield min(below, key=lambda each: (each.promise, each.bytes))


def _promising_below(tried: Sequence[Tried], worth: float) -> list[Tried]:
    return [each for each in tried if each.promise <= worth]


def _open(tried: Sequence[Tried], above: int, below: int) -> list[Tried]:
    """Those between two memories that have not run yet."""
    return [each for each in tried if each.measured is None and not each.refused and above < each.bytes < below]


def _middle(tried: Sequence[Tried]) -> Tried:
    """The most promising of those in the middle of the memories."""
    by_bytes = sorted(tried, key=lambda each: each.bytes)
    middle = by_bytes[len(by_bytes) // 2].bytes
    near = [each for each in by_bytes if 0.95 * middle <= each.bytes <= 1.05 * middle]
    return min(near, key=lambda each: (each.promise, each.candidate.number))


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's: of the ranks, equal numbers sharing theirs. None for fewer than three, or where all are equal."""
    if len(left) < 3 or len(set(left)) < 2 or len(set(right)) < 2:
        return None
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(numbers: Sequence[float]) -> np.ndarray:
    found = np.asarray(numbers, dtype=float)
    return np.array([(found < number).sum() + (found == number).sum() / 2 for number in found])
