"""Accuracy against budget as a PNG picture, drawn by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from kvpolicy.lab.chart import DPI, require_matplotlib
from kvpolicy.lab.compare.curves import Panel, aside, panels
from kvpolicy.lab.compare.report import Report
from kvpolicy.lab.palette import INK, LINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = 4.6
"""Width of a task's panel."""

COLUMNS = 3
"""Panels beside one another; more go below."""

MARKS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D"}

ROOM = 0.16
"""Of the distance between two budgets, how far points are moved aside at the most."""


def picture(report: Report) -> bytes:
    """The picture, as the bytes of a PNG file: a panel for every task, budgets evenly spaced.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_matplotlib("a PNG picture")
    from matplotlib.figure import Figure

    shown = panels(report)
    columns = min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(INCHES * columns + 0.6, 3.9 * lines + 0.9), dpi=DPI, layout="constrained")
    figure.suptitle(f"{report.model}: right answers by budget, with 95 % intervals", fontsize=11)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for axes, panel in zip(grid, shown, strict=False):
        _panel(axes, panel)
    for axes in grid[len(shown) :]:
        axes.remove()
    grid[0].set_ylabel("right answers")
    handles: dict[str, Any] = {}
    for axes in grid[: len(shown)]:
        handles |= {str(label): handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = min(4, 1 + 2 * columns)
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=columns, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _panel(axes: Axes, panel: Panel) -> None:
    score = panel.full.score
    if score is not None:
        axes.axhspan(100 * score.low, 100 * score.high, color=LINE, alpha=0.35, linewidth=0)
        axes.axhline(100 * score.share, color=INK, linewidth=1.2, label="full cache")
    moved = aside(panel.curves)
    for curve in panel.curves:
        known = [(entry, entry.score) for entry in curve.entries if entry.score is not None]
        x = [panel.budgets.index(entry.budget or 0) + ROOM * moved[curve.label] for entry, _ in known]
        y = [100 * found.share for _, found in known]
        reach = [
            [100 * (found.share - found.low) for _, found in known],
            [100 * (found.high - found.share) for _, found in known],
        ]
        axes.errorbar(
            x, y, reach, color=curve.colour, marker=MARKS[curve.marker], markersize=5, linewidth=1.4, elinewidth=0.9,
            capsize=2, linestyle=(0, (3, 2)) if curve.control else "-", label=curve.label,
            markerfacecolor="white" if curve.control else curve.colour,
        )  # fmt: skip
    axes.set_title(f"{panel.task} ({panel.full.items} items)", fontsize=10, loc="left")
    axes.set_xticks(range(len(panel.budgets)), [f"{budget:,}" for budget in panel.budgets])
    axes.set_xlabel("budget (tokens)", fontsize=9)
    axes.set_xlim(-0.4, max(1, len(panel.budgets)) - 0.6)
    axes.set_ylim(-3, 105)
    axes.set_yticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
