"""A search as a PNG picture, drawn by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvpolicy.lab.chart import DPI, png, require_matplotlib
from kvpolicy.lab.palette import INK, LINE, SHADES
from kvpolicy.lab.tune.goal import Tried
from kvpolicy.lab.tune.search import Tuning

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 1e-5
"""Nats and shares of error below which two caches are alike to any reader: the lower end of both scales."""

RAN, BEST = SHADES[0].ranked, SHADES[1].safe


def picture(run: Tuning) -> bytes:
    """The picture, as the bytes of a PNG file: agreement by memory with its front, and on the right how the order on
    recorded attention told that on the model.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_matplotlib("a PNG picture")
    from matplotlib.figure import Figure

    known = [tried for tried in run.measured if tried.kept is not None]
    figure = Figure(figsize=(11 if known else 6, 4.6), dpi=DPI, layout="constrained")
    count = len(run.texts)
    figure.suptitle(
        f"{run.policy.name} on {run.model}: {len(run.measured)} settings on {count} text{'s' if count > 1 else ''}",
        fontsize=11,
    )
    panels = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    _front(panels[0], run)
    if known:
        _order(panels[1], run, known)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return png(figure)


def _front(axes: Axes, run: Tuning) -> None:
    unit, size = next(
        ((unit, size) for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if run.full >= size), ("B", 1)
    )

    def points(tried: Sequence[Tried]) -> tuple[list[float], list[float]]:
        return [each.bytes / size for each in tried], [100 * each.found.agreement.value for each in tried]

    x, y = points(run.measured)
    below = [100 * (each.found.agreement.value - each.found.agreement.low) for each in run.measured]
    above = [100 * (each.found.agreement.high - each.found.agreement.value) for each in run.measured]
    axes.errorbar(x, y, yerr=[below, above], fmt="o", color=RAN, ecolor=LINE, markersize=5, label="ran on the model")
    axes.plot(*points(run.front), drawstyle="steps-post", color=INK, linewidth=1.2, label="front")
    if run.chosen is not None:
        axes.plot(*points([run.chosen]), "o", color=BEST, markersize=9, label="chosen", zorder=3)
    axes.axvline(run.full / size, color=INK, linestyle=(0, (4, 2)), linewidth=1, label="the full cache")
    if run.goal.memory is not None:
        axes.axvline(run.goal.memory / size, color=BEST, linestyle=(0, (1, 1.5)), linewidth=1.2, label="asked for")
    elif run.goal.agreement is not None:
        axes.axhline(100 * run.goal.agreement, color=BEST, linestyle=(0, (1, 1.5)), linewidth=1.2, label="asked for")
    axes.set_xlim(left=0)
    axes.set_ylim(top=101)
    axes.set_xlabel(f"memory of the cache, {unit} a row", fontsize=9)
    axes.set_title("same first choice as the full cache, %", fontsize=10, loc="left")
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)


def _order(axes: Axes, run: Tuning, known: Sequence[Tried]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    x = [max(LEAST, tried.promise) for tried in known]
    y = [max(LEAST, tried.found.kl.value) for tried in known]
    axes.loglog(x, y, "o", color=RAN, markersize=5)
    if run.chosen in known and run.chosen is not None:
        axes.plot(max(LEAST, run.chosen.promise), max(LEAST, run.chosen.found.kl.value), "o", color=BEST, markersize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    rank = run.correlation("kl")
    title = "KL on the model, nats" + ("" if rank is None else f" (rank correlation {rank:+.2f})")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("error of attention's output on recorded attention", fontsize=9)
    axes.grid(color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
