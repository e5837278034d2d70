"""Numbers with intervals as curves over a few places: what any picture of them draws, as PNG or in a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvpolicy.lab.palette import SHADES

MARKERS = ("circle", "square", "triangle", "diamond")
"""A second line of one colour has another marker."""

GREY = "#767676"
"""Of controls, which are dashed as well: it stands out on white and on black alike."""


@dataclass(frozen=True)
class Point:
    """A number over place ``at`` of the axis, and where the true one lies; ``words`` say it to who points at it."""

    at: int
    value: float
    low: float
    high: float
    words: str = ""


@dataclass(frozen=True)
class Line:
    """Points that belong together. ``control``: dashed and hollow."""

    label: str
    points: tuple[Point, ...]
    colour: str
    marker: str
    control: bool = False


@dataclass(frozen=True)
class Axis:
    """What stands upright: numbers from ``bottom`` to ``top``; what lies below is drawn at the bottom.

    shares: told in percent. log: each power of ten as high as any other.
    """

    bottom: float = 0.0
    top: float = 1.0
    shares: bool = True
    log: bool = False

    @classmethod
    def of_shares(cls, least: float) -> Axis:
        """Up to 100 %, from the next fifth below the least of them."""
        return cls(bottom=min(0.8, math.floor(5 * least) / 5))

    @classmethod
    def decades(cls, least: float, most: float) -> Axis:
        """Whole powers of ten around numbers above 0, one of them at least."""
        bottom = math.floor(math.log10(least))
        return cls(10.0**bottom, 10.0 ** max(bottom + 1, math.ceil(math.log10(most))), shares=False, log=True)

    def part(self, value: float) -> float:
        """How far up a number is drawn: 0 at the bottom, 1 at the top."""
        value, low, high = (
            math.log10(each) if self.log else each for each in (max(value, self.bottom), self.bottom, self.top)
        )
        return (value - low) / (high - low)

    @property
    def marks(self) -> list[tuple[float, str]]:
        """How far up what is written beside it stands, from the bottom to the top, and the words."""
        if self.log:
            powers = range(round(math.log10(self.bottom)), round(math.log10(self.top)) + 1)
            return [(self.part(10.0**power), f"{10.0**power:g}") for power in powers]
        values = [self.bottom + part * (self.top - self.bottom) for part in (0, 0.25, 0.5, 0.75, 1)]
        return [(self.part(each), f"{100 * each:.0f} %" if self.shares else f"{each:.3g}") for each in values]


@dataclass(frozen=True)
class Panel:
    """Lines over the same places.

    places: what stands under the axis, evenly spaced. across: what they are. full: the full cache's value and its
    interval, a line and a band through all places.
    """

    title: str
    caption: str
    places: tuple[str, ...]
    across: str
    lines: tuple[Line, ...]
    full: Point | None = None
    axis: Axis = Axis()


def dressed(label: str, number: int, points: Sequence[Point], *, control: bool = False) -> Line:
    """Line number ``number`` of its kind: its colour and marker are those of no other near it."""
    colour = GREY if control else SHADES[number % len(SHADES)].safe
    marker = MARKERS[(number + number // len(SHADES)) % len(MARKERS)]
    return Line(label, tuple(sorted(points, key=lambda point: point.at)), colour, marker, control)


def aside(lines: Sequence[Line]) -> list[float]:
    """How far the points of each line are moved aside, from -1 to 1, so that intervals do not hide one another."""
    if len(lines) < 2:
        return [0.0 for _ in lines]
    return [2 * number / (len(lines) - 1) - 1 for number in range(len(lines))]
