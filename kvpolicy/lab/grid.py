"""A course of a simulation on a coarse grid, for pictures whose cells cover several tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kvpolicy.lab.simulation import GONE, MISSED, UNSAID, Course


class Cell(NamedTuple):
    """Some neighbouring tokens at a moment.

    ``pool``: the number of the pool that holds most of those that are held, None where none is; ``safe``: whether most
    of them could not have been dropped; ``share``: of those said, how many are held; ``said``: whether any has been;
    ``missed``: one of them was wanted while it was gone, at this moment or since the row above.
    """

    pool: int | None
    safe: bool
    share: float
    said: bool
    missed: bool


def sampled(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` moments, evenly spread, the first and the last among them."""
    return sorted({round(number) for number in np.linspace(0, count - 1, min(count, most))})


def edges(tokens: int, cells: int) -> list[int]:
    """Where each of at most ``cells`` cells begins, and where the last ends; all are of one width but the last."""
    width = -(-tokens // cells)
    return [*range(0, tokens, width), tokens]


def rows(course: Course, moments: Sequence[int], cells: Sequence[int]) -> Iterator[list[Cell]]:
    """One row of cells for each of these moments."""
    missed, above = course.wanted.where(course.wanted.state == MISSED), -1
    for moment in moments:
        states = course.states.at(moment, course.length)
        lost = np.zeros(course.length, dtype=bool)
        lost[missed.within(above + 1, moment).token] = True
        yield [_cell(states[a:b], lost[a:b]) for a, b in pairwise(cells)]
        above = moment


def _cell(states: np.ndarray, lost: np.ndarray) -> Cell:
    said = states[states != UNSAID]
    kept = said[said != GONE] - 2
    pool = int(np.bincount(kept // 2).argmax()) if len(kept) else None
    safe = len(kept) > 0 and 2 * int((kept % 2).sum()) >= len(kept)
    return Cell(pool, safe, len(kept) / max(1, len(said)), len(said) > 0, bool(lost.any()))
