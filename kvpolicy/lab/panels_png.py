"""Panels as a PNG picture, drawn by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvpolicy.lab.chart import DPI, png, require_matplotlib
from kvpolicy.lab.palette import INK, LINE
from kvpolicy.lab.panels import Panel, aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = 4.6
"""Width of a panel."""

INK_INCHES, LETTER_INCHES = 0.55, 0.075
"""Width of a legend's line and of each letter beside it, about."""

COLUMNS = 3
"""Panels beside one another; more go below."""

MARKS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D"}

ROOM = 0.16
"""Of the distance between two places, how far points are moved aside at the most."""


def picture(title: str, shown: Sequence[Panel], upright: str = "", columns: int = COLUMNS) -> bytes:
    """The picture, as the bytes of a PNG file; ``upright``: what the values are, ``columns``: panels side by side.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_matplotlib("a PNG picture")
    from matplotlib.figure import Figure

    columns = max(1, min(columns, len(shown)))
    lines = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(INCHES * columns + 0.6, 3.9 * lines + 0.9), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11)
    alike = len({panel.axis for panel in shown}) == 1
    grid = figure.subplots(lines, columns, squeeze=False, sharey=alike).flatten()
    for axes, panel in zip(grid, shown, strict=False):
        _panel(axes, panel)
    for axes in grid[len(shown) :]:
        axes.remove()
    grid[0].set_ylabel(upright)
    handles: dict[str, Any] = {}
    for axes in grid[: len(shown)]:
        handles |= {str(label): handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    wide = INK_INCHES + LETTER_INCHES * max((len(label) for label in handles), default=0)
    keys = min(4, max(1, int((INCHES * columns + 0.6) / wide)))
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=keys, fontsize=9)
    return png(figure)


def _panel(axes: Axes, panel: Panel) -> None:
    high = panel.axis.part
    if panel.full is not None:
        axes.axhspan(high(panel.full.low), high(panel.full.high), color=LINE, alpha=0.35, linewidth=0)
        axes.axhline(high(panel.full.value), color=INK, linewidth=1.2, label="full cache")
    for line, moved in zip(panel.lines, aside(panel.lines), strict=True):
        x = [point.at + ROOM * moved for point in line.points]
        y = [high(point.value) for point in line.points]
        reach = [
            [high(point.value) - high(point.low) for point in line.points],
            [high(point.high) - high(point.value) for point in line.points],
        ]
        axes.errorbar(
            x, y, reach, color=line.colour, marker=MARKS[line.marker], markersize=5, linewidth=1.4, elinewidth=0.9,
            capsize=2, linestyle=(0, (3, 2)) if line.control else "-", label=line.label,
            markerfacecolor="white" if line.control else line.colour,
        )  # fmt: skip
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xticks(range(len(panel.places)), list(panel.places))
    axes.set_xlabel(panel.across, fontsize=9)
    axes.set_xlim(-0.4, max(1, len(panel.places)) - 0.6)
    axes.set_ylim(-0.03, 1.05)
    axes.set_yticks([part for part, _ in panel.axis.marks], [words for _, words in panel.axis.marks])
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
