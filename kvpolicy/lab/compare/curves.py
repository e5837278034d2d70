"""Scores against budgets, as any picture draws them: curves with their points, and how each is told from the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpolicy.lab.compare.report import Entry, Report, controls
from kvpolicy.lab.palette import SHADES

MARKERS = ("circle", "square", "triangle", "diamond")
"""A second curve of one colour has another marker."""

GREY = "#767676"
"""Of the controls, which are dashed as well: it stands out on white and on black alike."""


@dataclass(frozen=True)
class Curve:
    """One policy on one task: its entries that have a score, by budget."""

    label: str
    entries: tuple[Entry, ...]
    colour: str
    marker: str
    control: bool


@dataclass(frozen=True)
class Panel:
    """One task. ``budgets`` are those of all curves, in order; ``full`` the full cache's entry; ``alone``: policies
    with their own budget, which have no place on the axis."""

    task: str
    budgets: tuple[int, ...]
    curves: tuple[Curve, ...]
    full: Entry
    alone: tuple[Entry, ...]


def panels(report: Report) -> list[Panel]:
    """A panel for each task; a policy has the same colour and marker in all."""
    labels = list(dict.fromkeys(entry.label for entry in report.entries if entry.budget is not None))
    asked = [label for label in labels if label not in controls()]
    beside = [label for label in labels if label in controls()]
    found = []
    for task in report.tasks:
        entries = [entry for entry in report.entries if entry.task == task]
        placed = [entry for entry in entries if entry.budget is not None and entry.score is not None]
        curves = [_curve(label, asked.index(label), placed, False) for label in asked]
        curves += [_curve(label, beside.index(label), placed, True) for label in beside]
        found.append(
            Panel(
                task,
                tuple(sorted({entry.budget for entry in placed if entry.budget is not None})),
                tuple(curve for curve in curves if curve.entries),
                entries[0],
                tuple(entry for entry in entries[1:] if entry.budget is None and entry.score is not None),
            )
        )
    return found


def _curve(label: str, number: int, entries: Sequence[Entry], control: bool) -> Curve:
    own = sorted((entry for entry in entries if entry.label == label), key=lambda entry: entry.budget or 0)
    colour = GREY if control else SHADES[number % len(SHADES)].safe
    turn = number // len(SHADES)
    return Curve(label, tuple(own), colour, MARKERS[(number + turn) % len(MARKERS)], control)


def aside(curves: Sequence[Curve]) -> dict[str, float]:
    """By label, how far a curve's points are moved aside, from -1 to 1, so that intervals do not hide one another."""
    if len(curves) < 2:
        return {curve.label: 0.0 for curve in curves}
    return {curve.label: 2 * number / (len(curves) - 1) - 1 for number, curve in enumerate(curves)}
