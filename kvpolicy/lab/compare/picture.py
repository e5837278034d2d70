"""Accuracy against budget as a PNG picture."""

from __future__ import annotations

from kvpolicy.lab import panels_png
from kvpolicy.lab.compare.curves import panels
from kvpolicy.lab.compare.report import Report


def picture(report: Report) -> bytes:
    """The picture, as the bytes of a PNG file: a panel for every task, budgets evenly spaced.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    title = f"{report.model}: right answers by budget, with 95 % intervals"
    return panels_png.picture(title, panels(report), "right answers")
