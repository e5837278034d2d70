"""Numbers with intervals as curves over a few places: what any picture of them draws, as PNG or in a page."""

from __future__ import annotations

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
class Panel:
    """Lines over the same places.

    places: what stands under the axis, evenly spaced. across: what they are. full: the full cache's value and its
    interval, a line and a band through all places. top: where the axis ends, which begins at 0; shares end at 1 and are
    told in percent.
    """

    title: str
    caption: str
    places: tuple[str, ...]
    across: str
    lines: tuple[Line, ...]
    full: Point | None = None
    top: float = 1.0
    shares: bool = True

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Values on the axis, from the bottom to the top, and their words."""
        return [(self.top * part, f"{100 * part:.0f} %" if self.shares else f"{self.top * part:.3g}")
                for part in (0, 0.25, 0.5, 0.75, 1)]  # fmt: skip


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
