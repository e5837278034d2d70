"""A report as a PNG picture, drawn by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvpolicy.lab.bench.rows import Capacity, Growth, Report, Row
from kvpolicy.lab.chart import DPI, png, require_matplotlib
from kvpolicy.lab.palette import INK, LINE, SHADES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OF_A_LENGTH = "dense, "
"""How references are called that are full caches of lengths of their own."""

BAR = 0.34
"""Inches of a bar, the space below it included."""


def picture(report: Report) -> bytes:
    """The picture, as the bytes of a PNG file: a panel for every reference, one for equal memory, one for growth.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_matplotlib("a PNG picture")
    from matplotlib.figure import Figure

    policies = [row for row in report.rows if row.is_policy]
    shown: list[Row | Growth | Capacity] = [*policies, *report.growths, *report.capacities]
    labels = list(dict.fromkeys(row.label for row in shown))
    colours = {label: SHADES[number % len(SHADES)] for number, label in enumerate(labels)}
    panels: list[tuple[int, Any]] = []
    for reference in dict.fromkeys(name for row in policies for name in row.ratios):
        rows = [row for row in policies if reference in row.ratios]
        panels.append((len(rows), lambda axes, rows=rows, name=reference: _ratios(axes, rows, name, colours)))
    capacities = [row for row in report.capacities if row.times_dense is not None]
    if capacities:
        panels.append((len(capacities), lambda axes: _capacities(axes, capacities, colours)))
    if report.growths:
        panels.append((len(report.growths), lambda axes: _growths(axes, report.growths, colours)))
    heights = [BAR * count + 1.1 for count, _ in panels] or [1.5]
    figure = Figure(figsize=(8.4, sum(heights) + 0.5), dpi=DPI, layout="constrained")
    figure.suptitle(f"{report.model} on {report.device}", fontsize=11)
    for axes, (_, draw) in zip(_stack(figure, heights), panels, strict=False):
        draw(axes)
    return png(figure)


def _stack(figure: Any, heights: Sequence[float]) -> list[Axes]:
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    return [figure.add_subplot(grid[number, 0]) for number in range(len(heights))]


def _ratios(axes: Axes, rows: Sequence[Row], reference: str, colours: dict[str, Any]) -> None:
    own = reference.startswith(OF_A_LENGTH)  # the reference says what it is as long as
    where = [f"{_k(row.budget)}{'' if own else f' of {_k(row.context)}'}, batch {row.batch}" for row in rows]
    values, ideals = [row.ratios[reference] for row in rows], [row.ideal[reference] for row in rows]
    _bars(axes, [row.label for row in rows], where, values, colours)
    for place, ideal in enumerate(ideals):
        axes.plot([ideal, ideal], [place - 0.4, place + 0.4], color=INK, linewidth=1.6)
    axes.set_xlim(0, 1.12 * max(1.0, *values, *ideals))
    said = {"dense": "the full cache, whole context", "dense-at-budget": "a full cache of the budget's size"}
    if own:
        said[reference] = f"a full cache of {reference.removeprefix(OF_A_LENGTH)} tokens"
    axes.set_title(
        f"a step is this many times as fast as with {said.get(reference, reference)}", fontsize=10, loc="left"
    )
    axes.set_xlabel("black mark: what bytes alone would give", fontsize=8)


def _capacities(axes: Axes, rows: Sequence[Capacity], colours: dict[str, Any]) -> None:
    where = [f"{_k(row.budget)} of {_k(row.context)}, {row.batch:,} rows" for row in rows]
    values = [row.times_dense or 0.0 for row in rows]
    _bars(axes, [row.label for row in rows], where, values, colours)
    axes.set_xlim(0, 1.12 * max(1.0, *values))
    ran = all(row.tokens_per_second is not None for row in rows)
    axes.set_title(
        "tokens a second of the full cache's in the same memory" + ("" if ran else ", by bytes"),
        fontsize=10,
        loc="left",
    )


def _growths(axes: Axes, rows: Sequence[Growth], colours: dict[str, Any]) -> None:
    values = [row.ratio for row in rows]
    where = ["full cache" if row.budget is None else f"budget {_k(row.budget)}" for row in rows]
    _bars(axes, [row.label for row in rows], where, values, colours)
    axes.set_xlim(0, 1.12 * max(1.0, *values))
    early, late = rows[0].seen
    axes.set_title(
        f"a step after {late:,} tokens takes this many times as long as one after {early:,}", fontsize=10, loc="left"
    )


def _bars(
    axes: Axes, labels: Sequence[str], where: Sequence[str], values: Sequence[float], colours: dict[str, Any]
) -> None:
    places = range(len(values))
    axes.barh(places, values, height=0.62, color=[colours[label].ranked for label in labels],
              edgecolor=[colours[label].safe for label in labels])  # fmt: skip
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    for place, value in zip(places, values, strict=True):
        axes.text(0.02, place, f"{value:.2f}", va="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_yticks(places, [f"{label}  ({at})" for label, at in zip(labels, where, strict=True)], fontsize=8)
    axes.set_ylim(max(len(values), 2) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)


def _k(tokens: int | None) -> str:
    """`2k`, `1,000`; `all` for None."""
    if tokens is None:
        return "all"
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"
