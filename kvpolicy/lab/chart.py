"""Simulations as a PNG picture, drawn by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpolicy.errors import MissingExtra
from kvpolicy.lab.palette import GONE, INK, LINE, MISSED, PAPER, pool_names, shade
from kvpolicy.lab.simulation import GONE as EVICTED
from kvpolicy.lab.simulation import MISSED as WANTED_AND_GONE
from kvpolicy.lab.simulation import UNSAID, Course, Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray

DPI = 120
INCHES = 4.2
"""Width of a policy's column."""

WIDE, HIGH = 480, 330
"""Pixels of a picture of tokens before it is laid out."""


def require_matplotlib(what: str) -> None:
    """Raise MissingExtra where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise MissingExtra(f"{what} needs matplotlib to draw; `pip install 'kvpolicy[plot]'` brings it")


def chart(simulations: Sequence[Simulation], title: str) -> bytes:
    """The picture, as the bytes of a PNG file: a column per policy, all on the same scales.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_matplotlib("a PNG picture")
    from matplotlib.figure import Figure

    columns = len(simulations)
    lines = textwrap.wrap(title, 52 * columns)
    figure = Figure(figsize=(INCHES * columns + 0.4, 6.4 + 0.25 * len(lines)), dpi=DPI, layout="constrained")
    figure.suptitle("\n".join(lines), fontsize=11)
    grid = figure.subplots(
        3, columns, squeeze=False, sharex="col", sharey="row", gridspec_kw={"height_ratios": (4, 1.4, 1.2)}
    )
    for column, simulation in enumerate(simulations):
        course = simulation.shown
        tokens, counts, mass = grid[:, column]
        tokens.set_title(f"{simulation.label}: keeps {course.mean_mass:.1%} of the attention", fontsize=11)
        _tokens(tokens, course)
        _counts(counts, course, max(other.shown.highest for other in simulations))
        _mass(mass, course)
        if not column:
            tokens.set_ylabel("token (position)")
            counts.set_ylabel("tokens held")
            mass.set_ylabel("attention kept")
    figure.align_ylabels(grid[:, 0])
    figure.legend(handles=list(_legend(simulations)), loc="outside lower center", ncols=min(3, 1 + columns), fontsize=9)
    return png(figure)


def png(figure: Any) -> bytes:
    """A matplotlib figure as the bytes of a file; equal figures are equal files."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _tokens(axes: Axes, course: Course) -> None:
    extent = (0.0, float(len(course.t)), float(course.length), 0.0)
    axes.imshow(image(course), extent=extent, aspect="auto", interpolation="nearest")
    missed = course.wanted.where(course.wanted.state == WANTED_AND_GONE)
    axes.hlines(missed.token + 0.5, missed.start, missed.stop, colors=MISSED, linewidth=2)
    axes.set_ylim(course.length, 0)


def image(course: Course) -> Array:
    """[HIGH, WIDE, 3] bytes: tokens from top to bottom, time from left to right; what is safe is striped."""
    moments, tokens = len(course.t), course.length
    row, column = np.arange(HIGH) * tokens // HIGH, np.arange(WIDE) * moments // WIDE
    states = np.empty((HIGH, WIDE), dtype=int)
    for moment in np.unique(column).tolist():
        states[:, column == moment] = course.states.at(moment, tokens)[row][:, None]
    colours = {UNSAID: PAPER, EVICTED: GONE}
    for pool in range(len(course.pools)):
        colours |= {2 + 2 * pool: shade(pool).ranked, 3 + 2 * pool: shade(pool).safe}
    palette = np.array([_rgb(colours[state]) for state in range(len(colours))], dtype=float)
    pixels = palette[states]
    diagonal = (np.arange(HIGH)[:, None] + np.arange(WIDE)) % 8 < 2
    stripes = diagonal & (states > EVICTED) & (states % 2 == 1)
    pixels[stripes] += 0.5 * (255 - pixels[stripes])
    return pixels.astype(np.uint8)


def _counts(axes: Axes, course: Course, top: int) -> None:
    """Pools one upon the other, each with its budget upon those below it; 0..``top`` tokens."""
    edges, floor = _edges(course), np.zeros(len(course.t))
    for number in range(len(course.pools)):
        ceiling = floor + course.resident[number]
        axes.stairs(ceiling, edges, baseline=floor, fill=True, color=shade(number).ranked)
        axes.stairs(ceiling, edges, baseline=None, color=shade(number).safe, linewidth=1)
        axes.stairs(
            floor + course.budget[number], edges, baseline=None, color=INK, linestyle=(0, (4, 2)), linewidth=1.2
        )
        floor = ceiling
    axes.set_ylim(0, 1.08 * top)


def _mass(axes: Axes, course: Course) -> None:
    axes.stairs(100 * course.mass, _edges(course), baseline=None, color=INK, linewidth=1.2)
    axes.set_ylim(0, 105)
    axes.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_xlabel("t (generated tokens)")
    last = len(course.t) - 1
    axes.xaxis.set_major_formatter(lambda moment, _: str(course.t[min(max(0, round(moment)), last)]))


def _edges(course: Course) -> Array:
    """Where each moment begins, and where the last ends [M + 1]."""
    return np.arange(len(course.t) + 1)


def _legend(simulations: Sequence[Simulation]) -> Iterator[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for number, pool in enumerate(pool_names(simulations)):
        yield Patch(facecolor=shade(number).safe, edgecolor=PAPER, hatch="////", label=f"{pool}: safe")
        yield Patch(facecolor=shade(number).ranked, label=f"{pool}: ranked, the lowest goes")
    yield Patch(facecolor=GONE, label="evicted")
    yield Line2D([], [], color=MISSED, linewidth=2, label="evicted, and wanted now")
    yield Line2D([], [], color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label="budget")


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
