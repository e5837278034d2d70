"""An analysis as a PNG picture, drawn by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvpolicy.lab.analyze.facts import OUTPUT, PARTS, PROMPT
from kvpolicy.lab.analyze.rules import JUDGED
from kvpolicy.lab.analyze.summary import Analysis, survival
from kvpolicy.lab.chart import DPI, png, require_matplotlib
from kvpolicy.lab.palette import CLASSES, INK, LINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def picture(analysis: Analysis) -> bytes:
    """The picture, as the bytes of a PNG file: heads, layers, lives of milestones and silences of phoenixes.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_matplotlib("a PNG picture")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers = len(analysis.layers)
    tall = max(1.8, 0.16 * layers)
    figure = Figure(figsize=(11, tall + 4), dpi=DPI, layout="constrained")
    tokens = sum(text.length for text in analysis.texts)
    several = f" of {len(analysis.texts)} texts" if len(analysis.texts) > 1 else ""
    figure.suptitle(f"{analysis.model}: attention over {tokens:,} tokens{several}", fontsize=11)
    grid = figure.subplots(2, 2, gridspec_kw={"height_ratios": (tall, 2.2)})
    _heads(grid[0, 0], analysis)
    _layers(grid[0, 1], analysis)
    _lives(grid[1, 0], analysis)
    _silences(grid[1, 1], analysis)
    words = {"window": "new (tokens: local)", "rest": "other (tokens: lazy)"}
    handles = [Patch(facecolor=CLASSES[name], label=words.get(name, name)) for name in PARTS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(PARTS), fontsize=9)
    return png(figure)


def _heads(axes: Axes, analysis: Analysis) -> None:
    """A box for each head, filled by where its attention goes."""
    attention = analysis.attention()
    layers, heads, _ = attention.shape
    left = np.broadcast_to(np.arange(heads) + 0.06, (layers, heads)).copy()
    row = np.broadcast_to(np.arange(layers)[:, None], (layers, heads))
    for number, name in enumerate(PARTS):
        wide = 0.88 * attention[..., number]
        axes.barh(row.ravel(), wide.ravel(), left=left.ravel(), height=0.8, color=CLASSES[name])
        left += wide
    axes.set_xticks(np.arange(heads) + 0.5, [str(head) for head in range(heads)])
    axes.set_xlim(0, heads)
    axes.set_xlabel("head", fontsize=9)
    axes.set_title("where each head's attention goes", fontsize=10, loc="left")
    _of_layers(axes, analysis)


def _layers(axes: Axes, analysis: Analysis) -> None:
    shares = analysis.layer_shares().value
    left = np.zeros(len(shares))
    for number, kind in enumerate(JUDGED):
        axes.barh(range(len(shares)), shares[:, number], left=left, height=0.8, color=CLASSES[kind.word])
        left += shares[:, number]
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.set_title("tokens by class, in each layer", fontsize=10, loc="left")
    _of_layers(axes, analysis)


def _of_layers(axes: Axes, analysis: Analysis) -> None:
    count = len(analysis.layers)
    shown = sorted({round(number) for number in np.linspace(0, count - 1, min(count, 8))})
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks(shown, [str(analysis.layers[index]) for index in shown])
    axes.set_ylabel("layer", fontsize=9)
    axes.tick_params(labelsize=8)


def _lives(axes: Axes, analysis: Analysis) -> None:
    for part, name, dash in ((PROMPT, "prompt", (0, (4, 2))), (OUTPUT, "output", "-")):
        life, ended = analysis.lives(part)
        if len(life):
            times, lasting = survival(life, ended)
            axes.step([0, *times], [1, *lasting], where="post", color=CLASSES["milestone"], linestyle=dash,
                      label=f"in the {name} ({len(life):,})")  # fmt: skip
    axes.set_ylim(0, 1.03)
    axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.set_title("milestones that live longer than so many queries", fontsize=10, loc="left")
    _plain(axes)


def _silences(axes: Axes, analysis: Analysis) -> None:
    parts: list[Any] = [analysis.silences(part) for part in (PROMPT, OUTPUT)]
    axes.hist(parts, bins=24, stacked=True, color=[CLASSES["phoenix"], CLASSES["phoenix"] + "80"],
              label=[f"in the prompt ({len(parts[0]):,})", f"in the output ({len(parts[1]):,})"])  # fmt: skip
    axes.set_title("phoenixes by the queries of their silence", fontsize=10, loc="left")
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("queries", fontsize=9, color=INK)
    axes.tick_params(labelsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
