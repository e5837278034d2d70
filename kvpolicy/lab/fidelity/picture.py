"""Fidelity by place of the output as a PNG picture, drawn by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvpolicy.lab.chart import DPI, require_matplotlib
from kvpolicy.lab.compare.arms import FULL
from kvpolicy.lab.fidelity.report import Entry
from kvpolicy.lab.palette import LINE, SHADES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (4, 1, 1, 1)))
"""By budget, the largest first."""

LEAST = 1e-4
"""Nats, the lower end of the scale: below it two distributions are alike to any reader."""


def picture(model: str, found: Sequence[Entry]) -> bytes:
    """The picture, as the bytes of a PNG file: KL, top-1 agreement and, where it was measured, the attention mass kept
    by place; a colour for each policy, a line style for each budget, and the interval as a band. Arms that did nothing
    are left out.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_matplotlib("a PNG picture")
    from matplotlib.figure import Figure

    shown = [entry for entry in found if entry.label != FULL and entry.worked]
    weighed = bool(shown) and all("mass" in entry.said for entry in shown)
    figure = Figure(figsize=(12 if weighed else 11, 4.2), dpi=DPI, layout="constrained")
    texts = max(entry.said["texts"] for entry in found)
    figure.suptitle(f"{model}: against the full cache on {texts} given texts, with 95 % intervals", fontsize=11)
    left, right, *last = figure.subplots(1, 3 if weighed else 2)
    _panel(left, shown, "kl", 1)
    left.set_yscale("log")
    left.set_ylim(bottom=LEAST)
    left.set_title("KL divergence, nats (lower is closer)", fontsize=10, loc="left")
    _panel(right, shown, "top1", 100)
    right.set_ylim(top=101)
    right.set_title("same first choice, %", fontsize=10, loc="left")
    for axes in last:
        _panel(axes, shown, "mass", 100)
        axes.set_ylim(0, 101)
        axes.set_title("attention mass kept, %", fontsize=10, loc="left")
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _panel(axes: Axes, shown: Sequence[Entry], measure: str, unit: float) -> None:
    labels = list(dict.fromkeys(entry.label for entry in shown))
    budgets = sorted({entry.budget or 0 for entry in shown}, reverse=True)
    for entry in shown:
        shade, style = labels.index(entry.label), budgets.index(entry.budget or 0)
        colour = (SHADES[shade % len(SHADES)].safe, SHADES[shade % len(SHADES)].ranked)[shade // len(SHADES) % 2]
        parts = entry.said["curves"][measure]
        x = [(part["from"] + part["to"]) / 2 for part in parts]
        low, middle, high = ([unit * part[name] for part in parts] for name in ("low", "value", "high"))
        axes.plot(x, middle, color=colour, linestyle=STYLES[style % len(STYLES)], linewidth=1.4, label=entry.name)
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("token of the output", fontsize=9)
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
