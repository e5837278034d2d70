"""Scores against budgets, as any picture draws them: a panel for each task."""

from __future__ import annotations

from collections.abc import Sequence

from kvpolicy.lab.compare.report import Entry, Report, controls
from kvpolicy.lab.panels import Line, Panel, Point, dressed

CAPTION = "Right answers by budget in tokens, with 95 % intervals; grey band: the full cache’s"


def panels(report: Report) -> list[Panel]:
    """A policy has the same colour and marker in all. Policies with their own budget have no place on the axis."""
    labels = list(dict.fromkeys(entry.label for entry in report.entries if entry.budget is not None))
    asked = [label for label in labels if label not in controls()]
    beside = [label for label in labels if label in controls()]
    found = []
    for task in report.tasks:
        entries = [entry for entry in report.entries if entry.task == task]
        placed = [entry for entry in entries if entry.budget is not None and entry.score is not None]
        budgets = sorted({entry.budget for entry in placed if entry.budget is not None})
        lines = [_line(label, asked.index(label), placed, budgets, False) for label in asked]
        lines += [_line(label, beside.index(label), placed, budgets, True) for label in beside]
        found.append(
            Panel(
                f"{task} ({entries[0].items} items)",
                CAPTION,
                tuple(f"{budget:,}" for budget in budgets),
                "budget (tokens)",
                tuple(line for line in lines if line.points),
                point(0, entries[0]),
            )
        )
    return found


def _line(label: str, number: int, entries: Sequence[Entry], budgets: Sequence[int], control: bool) -> Line:
    own = [entry for entry in entries if entry.label == label]
    placed = [(budgets.index(entry.budget), entry) for entry in own if entry.budget is not None]
    return dressed(
        label, number, [found for at, entry in placed if (found := point(at, entry)) is not None], control=control
    )


def point(at: int, entry: Entry) -> Point | None:
    """An entry's score over a place of the axis; None where it has none."""
    if entry.score is None:
        return None
    score = entry.score
    words = f"{entry.name}: {score.share:.1%} ({score.low:.1%} to {score.high:.1%})"
    return Point(at, score.share, score.low, score.high, words)
