"""Fidelity as curves: over budgets, and at one budget over the places of the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvpolicy.lab.compare.arms import FULL
from kvpolicy.lab.compare.report import controls
from kvpolicy.lab.fidelity.report import Entry
from kvpolicy.lab.panels import Line, Panel, Point, dressed

MEASURED = {
    "kl": ("KL divergence", "KL(full cache ‖ policy), nats, with 95 % intervals; lower is closer"),
    "top1": ("Same first choice", "Places where policy and full cache put the same token first, with 95 % intervals"),
    "mass": ("Attention mass kept", "Of the attention that queries would give to the whole text, what is left to them"),
}
"""By measure, what it is called and what a picture of it says."""


def shown(found: Sequence[Entry]) -> list[Entry]:
    """Entries with something to show: what did nothing is the full cache."""
    return [entry for entry in found if entry.label != FULL and entry.worked]


def by_budget(found: Sequence[Entry]) -> list[Panel]:
    """A panel for each measure, budgets across. Policies with their own budget have no place on the axis."""
    entries = [entry for entry in shown(found) if entry.budget is not None]
    budgets = sorted({entry.budget or 0 for entry in entries})
    panels = []
    for name in MEASURED:
        points: dict[str, list[Point]] = {}
        for entry in entries:
            if name in entry.said:
                at = budgets.index(entry.budget or 0)
                points.setdefault(entry.label, []).append(_point(at, entry.said[name], name, entry.name))
        panels.append(_panel(name, points, [f"{budget:,}" for budget in budgets], "budget (tokens)"))
    return [panel for panel in panels if panel.lines]


def by_place(found: Sequence[Entry], budget: int | None) -> list[Panel]:
    """A panel for each measure at one budget (None: the policies' own), places of the output across."""
    entries = [entry for entry in shown(found) if entry.budget == budget]
    panels = []
    for name in MEASURED:
        curves = {entry.label: entry.said["curves"][name] for entry in entries if name in entry.said["curves"]}
        longest: list[dict[str, Any]] = max(curves.values(), key=len, default=[])
        points = {
            label: [_point(at, part, name, f"{label}, {_span(part)}") for at, part in enumerate(curve)]
            for label, curve in curves.items()
        }
        places = [f"{part['to']:,}" for part in longest]
        panels.append(_panel(name, points, places, "tokens of the output, up to"))
    return [panel for panel in panels if panel.lines]


def _span(part: dict[str, Any]) -> str:
    return f"tokens {part['from']:,} to {part['to']:,}"


def _panel(name: str, points: dict[str, list[Point]], places: Sequence[str], across: str) -> Panel:
    title, caption = MEASURED[name]
    shares = name != "kl"
    top = 1.0 if shares else _round_up(max((point.high for line in points.values() for point in line), default=1.0))
    return Panel(title, caption, tuple(places), across, tuple(_lines(points)), top=top, shares=shares)


def _lines(points: dict[str, list[Point]]) -> list[Line]:
    beside = [label for label in points if label in controls()]
    asked = [label for label in points if label not in beside]
    return [dressed(label, number, points[label]) for number, label in enumerate(asked)] + [
        dressed(label, number, points[label], control=True) for number, label in enumerate(beside)
    ]


def _point(at: int, said: dict[str, Any], name: str, where: str) -> Point:
    value, low, high = said["value"], said["low"], said["high"]
    form = ".3g" if name == "kl" else ".1%"
    return Point(at, value, low, high, f"{where}: {value:{form}} ({low:{form}} to {high:{form}})")


def _round_up(value: float) -> float:
    """The next number of one digit, so that an axis ends at one."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit) * unit
