"""Fidelity as a PNG picture."""

from __future__ import annotations

from collections.abc import Sequence

from kvpolicy.lab import panels_png
from kvpolicy.lab.fidelity.panels import budgets_of, by_budget, by_place
from kvpolicy.lab.fidelity.report import Entry


def picture(model: str, found: Sequence[Entry]) -> bytes:
    """The picture, as the bytes of a PNG file: KL, top-1 agreement and, where it was measured, the attention mass kept,
    by budget where there are several, and at each budget by place. Arms that did nothing are left out.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    budgets = budgets_of(found)
    lines = [by_place(found, budget) for budget in budgets]
    if len(budgets) > 1:
        lines.insert(0, by_budget(found))
    panels = [panel for line in lines for panel in line]
    texts = max(entry.said["texts"] for entry in found)
    title = f"{model}: against the full cache on {texts} given texts, with 95 % intervals"
    if not panels:
        title += "\nNo policy dropped anything: there is nothing to draw."
    return panels_png.picture(title, panels, columns=max(map(len, lines), default=0))
