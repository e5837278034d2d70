"""Right answers by their place in the output: what is lost while writing shows in the answers that come last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpolicy.lab.bench.tables import Table
from kvpolicy.lab.compare.rows import Row
from kvpolicy.lab.compare.statistics import Interval, interval
from kvpolicy.lab.compare.tables import percent
from kvpolicy.lab.panels import Line, Panel, Point, dressed
from kvpolicy.lab.suites.accuracy import BUDGETS, Axis, Claim, Marks, scored
from kvpolicy.lab.suites.base import Experiment, Found, Lab, Rows, Tell

PARTS = 4
"""Into so many parts the answers of an item are cut, in the order in which they are asked for."""

SHOWN = 3
"""Budgets that are drawn, the middle ones of all."""


@dataclass(frozen=True)
class ByPlace(Experiment):
    """The rows of ``same``, an experiment over budgets, by the place of the answer. ``drawn``: in pictures, too; of
    many series a table says more."""

    name: str
    title: str
    paper: str
    same: str | None
    claims: tuple[Claim, ...] = ()
    drawn: bool = True
    axis: Axis = BUDGETS

    def measure(self, lab: Lab, path: Path, known: Sequence[Path], tell: Tell) -> list[str]:
        return []

    def tell(self, rows: Rows) -> Found:
        own = scored(rows)
        if max(len(row.right) for row in own) < PARTS:
            few = f"this task asks for fewer than {PARTS} answers an item, so that places cannot be told apart"
            return Found(doubts=[few])
        marks = Marks(own, self.axis)
        skip = max(0, len(marks.places) - SHOWN) // 2
        return Found(
            [_table(marks)],
            [self._panel(marks, place) for place in marks.places[skip : skip + SHOWN]] if self.drawn else [],
            findings=[claim.judged(marks) for claim in self.claims],
        )

    def _panel(self, marks: Marks, place: float) -> Panel:
        names = [name for name in marks.names if (name, place) in marks.of]
        lines = [_line("full cache", 0, marks.full, True)]
        lines += [_line(name, marks.names.index(name), marks.of[name, place], False) for name in names]
        return Panel(
            f"{marks.axis.words(place)} tokens",
            f"Right answers by place in the output, at a budget of {marks.axis.words(place)} tokens",
            tuple(_words(part) for part in range(PARTS)),
            "answers, in the order asked for",
            tuple(lines),
        )


def by_place(rows: Sequence[Row]) -> list[Interval]:
    """The share right of each part of the answers."""
    return [interval([_of(row, part) for row in rows]) for part in range(PARTS)]


def _of(row: Row, part: int) -> tuple[int, int]:
    """Right and asked for in a part of an item's answers."""
    count = len(row.right)
    cut = row.right[count * part // PARTS : count * (part + 1) // PARTS]
    return sum(cut), len(cut)


def _line(name: str, number: int, rows: Sequence[Row], control: bool) -> Line:
    points = [
        Point(part, each.share, each.low, each.high, f"{name}, {_words(part)}: {each.share:.1%}")
        for part, each in enumerate(by_place(rows))
    ]
    return dressed(name, number, points, control=control)


def _words(part: int) -> str:
    return f"{100 * part // PARTS}–{100 * (part + 1) // PARTS} %"


def _table(marks: Marks) -> Table:
    columns = ["", "budget", *(_words(part) for part in range(PARTS)), "last against first"]
    return Table("Percent right by place of the answer in the output (in brackets: 95 %)", columns, list(_lines(marks)))


def _lines(marks: Marks) -> Iterator[list[str]]:
    yield ["dense", "–", *_cells(by_place(marks.full))]
    for name in marks.names:
        for place in marks.places:
            if (name, place) in marks.of:
                yield [name, marks.axis.words(place), *_cells(by_place(marks.of[name, place]))]


def _cells(parts: Sequence[Interval]) -> list[str]:
    told = [f"{percent(each.share)} ({percent(each.low)}–{percent(each.high)})" for each in parts]
    return [*told, f"{100 * (parts[-1].share - parts[0].share):+.1f}"]
