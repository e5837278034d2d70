"""Fidelity as curves: over budgets, and at one budget over the places of the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvpolicy.lab.compare.arms import FULL
from kvpolicy.lab.compare.report import controls
from kvpolicy.lab.fidelity.report import Entry
from kvpolicy.lab.panels import Axis, Line, Panel, Point, dressed

MEASURED = {
    "kl": ("KL divergence in nats", "KL(full cache ‖ policy) in nats, lower is closer"),
    "top1": ("Same first choice", "Policy and full cache put the same token first"),
    "mass": ("Attention mass kept", "Share of attention to the whole text that was left"),
}
"""By measure, what it is called and what a picture of it says."""

LEAST = 1e-4
"""Nats, the lowest that the scale goes: below it two distributions are alike to any reader."""

BUDGETS, PLACES = "budget in tokens", "last token of each part of the output"
"""What stands under an axis."""


def shown(found: Sequence[Entry]) -> list[Entry]:
    """Entries with something to show: what did nothing is the full cache."""
    return [entry for entry in found if entry.label != FULL and entry.worked]


def budgets_of(found: Sequence[Entry]) -> list[int | None]:
    """Those of the policies, their own one (None) first; none where there is but the full cache."""
    return sorted({entry.budget for entry in found if entry.label != FULL}, key=lambda budget: budget or 0)


def by_budget(found: Sequence[Entry]) -> list[Panel]:
    """A panel for each measure, budgets across. Policies with their own budget have no place on the axis. Here and by
    place, a policy has the same colour and marker."""
    entries = [entry for entry in shown(found) if entry.budget is not None]
    budgets = sorted({entry.budget or 0 for entry in entries})
    panels = []
    for name in MEASURED:
        points: dict[str, list[Point]] = {}
        for entry in entries:
            if name in entry.said:
                at = budgets.index(entry.budget or 0)
                points.setdefault(entry.label, []).append(_point(at, entry.said[name], name, entry.name))
        lines = _lines(found, points)
        panels.append(_panel(name, MEASURED[name][0], lines, [f"{budget:,}" for budget in budgets], BUDGETS))
    return [panel for panel in panels if panel.lines]


def by_place(found: Sequence[Entry], budget: int | None) -> list[Panel]:
    """A panel for each measure at one budget (None: the policies' own), places of the output across."""
    entries = [entry for entry in shown(found) if entry.budget == budget]
    where = "" if budget is None else f", at {budget:,} tokens"
    panels = []
    for name in MEASURED:
        curves = {entry.label: entry.said["curves"][name] for entry in entries if name in entry.said["curves"]}
        longest: list[dict[str, Any]] = max(curves.values(), key=len, default=[])
        points = {
            label: [_point(at, part, name, f"{label}, {_span(part)}") for at, part in enumerate(curve)]
            for label, curve in curves.items()
        }
        places = [f"{part['to']:,}" for part in longest]
        panels.append(_panel(name, MEASURED[name][0] + where, _lines(found, points), places, PLACES))
    return [panel for panel in panels if panel.lines]


def _span(part: dict[str, Any]) -> str:
    return f"tokens {part['from']:,} to {part['to']:,}"


def _panel(name: str, title: str, lines: Sequence[Line], places: Sequence[str], across: str) -> Panel:
    points = [point for line in lines for point in line.points]
    least, most = min((point.low for point in points), default=1.0), max((point.high for point in points), default=1.0)
    axis = Axis.decades(max(LEAST, least), max(LEAST, most)) if name == "kl" else Axis.of_shares(least)
    caption = f"{MEASURED[name][1]}; by {across}, with 95 % intervals"
    return Panel(title, caption, tuple(places), across, tuple(lines), axis=axis)


def _lines(found: Sequence[Entry], points: dict[str, list[Point]]) -> list[Line]:
    labels = list(dict.fromkeys(entry.label for entry in shown(found)))
    beside = [label for label in labels if label in controls()]
    asked = [label for label in labels if label not in beside]
    return [
        dressed(label, group.index(label), points[label], control=group is beside)
        for group in (asked, beside)
        for label in group
        if label in points
    ]


def _point(at: int, said: dict[str, Any], name: str, where: str) -> Point:
    value, low, high = said["value"], said["low"], said["high"]
    form = ".3g" if name == "kl" else ".1%"
    return Point(at, value, low, high, f"{where}: {value:{form}} ({low:{form}} to {high:{form}})")
