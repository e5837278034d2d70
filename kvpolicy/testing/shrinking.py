"""Draws that can be replayed and made simpler: a case is the list of whole numbers that drew it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MOST = 600
"""Attempts to make one counter-example simpler."""

GONE = range(1, 33)
"""At the end a choice gets smaller and so many after it go: where one pool is left of two, the choices of the other."""


@dataclass
class Choices:
    """Whole numbers on demand: those given first, then random ones, or the lowest where there is no ``random``."""

    given: Sequence[int] = ()
    random: random.Random | None = None
    taken: list[int] = field(default_factory=list)

    def __call__(self, low: int, high: int) -> int:
        if len(self.taken) < len(self.given):
            number = min(high, low + self.given[len(self.taken)])
        else:
            number = low if self.random is None else self.random.randint(low, high)
        self.taken.append(number - low)
        return number


def shrink(taken: Sequence[int], fails: Callable[[Choices], bool], most: int = MOST) -> list[int]:
    """Fewer and smaller choices that still fail, in at most so many attempts.

    ``fails`` draws a case from the choices it is given and says whether it is still a counter-example.
    """
    best, left = list(taken), most

    def attempt(choices: list[int]) -> bool:
        nonlocal best, left
        if left <= 0 or choices == best:
            return False
        left -= 1
        replay = Choices(choices)
        if fails(replay) and (len(replay.taken), sum(replay.taken)) < (len(best), sum(best)):
            best = list(replay.taken)
            return True
        return False

    improved = True
    while improved and left > 0:
        before = list(best)
        for size in (32, 16, 8, 4, 2, 1):
            start = 0
            while start < len(best):
                without = best[:start] + best[start + size :]
                zeros = best[:start] + [0] * min(size, len(best) - start) + best[start + size :]
                if not attempt(without) and not attempt(zeros):
                    start += size
        for index in range(len(best)):
            while index < len(best) and best[index] > 0:
                value = best[index]
                if not any(attempt([*best[:index], low, *best[index + 1 :]]) for low in {value // 2, value - 1}):
                    break
        improved = best != before or any(
            attempt([*best[:index], best[index] - 1, *best[index + 1 + gone :]])
            for index in range(len(best))
            if best[index] > 0
            for gone in GONE
        )
    return best
