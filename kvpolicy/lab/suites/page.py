"""A suite as one HTML file that needs nothing beside it, and no JavaScript; and its pictures as PNG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from kvpolicy.lab import panels_png
from kvpolicy.lab.bench.tables import Table
from kvpolicy.lab.chart import DPI, png, require_matplotlib
from kvpolicy.lab.compare.page import listed
from kvpolicy.lab.drawing import WIDE, svg
from kvpolicy.lab.palette import GONE, INK, PAPER, SHADES
from kvpolicy.lab.panels_svg import figure, style
from kvpolicy.lab.suites.base import Experiment, Found, Heat
from kvpolicy.lab.suites.running import Outcome
from kvpolicy.lab.web_page import document

HIGH = 460
"""Units of a drawing of positions, which is WIDE."""

LEVELS = 10
"""Shades of a drawing of positions."""

STYLE = """
.heat { max-width: 32rem; }
.plot { cursor: default; }
h2 { margin-top: 1.4rem; }
"""


def page(told: Outcome) -> str:
    """The page: what was found first, then each experiment with its pictures and tables."""
    about = told.about
    header = f"""<h1>{escape(told.suite.title)}</h1>
<p class="faint">{escape(origin(about))}</p>
{listed("What came out", [f"{each.says}: {each.word}" for found in told.found.values() for each in found.findings])}"""
    sections = "\n".join(
        _section(each, told.found[each.name], told.refused.get(each.name, ()))
        for each in told.suite.experiments
        if each.name in told.found
    )
    after = f"<p class='faint'>{escape(about['command'])}</p>"
    return document(f"{told.suite.name} on {about['model']}", header, sections + after, style=style() + STYLE)


def origin(about: dict[str, object]) -> str:
    """Where the numbers come from."""
    machines = about["machines"]
    assert isinstance(machines, list)
    return (
        f"{about['model']}, {about['dtype']} on {about['device']}, task {about['task']}: {about['items']} items of "
        f"{about['size']} words, prompts of up to {about['prompt']} tokens and {about['limit']} new ones, seed "
        f"{about['seed']}, greedy; {'; '.join(map(_machine, machines))}"
    )


def _machine(told: Mapping[str, Any]) -> str:
    """A machine and what ran on it, with the date of its last rows."""
    known = ", ".join(f"{name} {told[name]}" for name in ("kvpolicy", "torch", "transformers"))
    threads = f"{told['threads']} thread{'' if told['threads'] == 1 else 's'}"
    return f"{known}, Python {told['python']}, {told['device']}, {threads}, {told['date'].partition(' ')[0]}"


def _section(experiment: Experiment, found: Found, refused: Sequence[str]) -> str:
    parts = [f"<h2>{escape(experiment.title)}</h2>", f'<p class="faint">In the paper: {escape(experiment.paper)}.</p>']
    parts += [f"<ul>{''.join(f'<li>{escape(str(each))}</li>' for each in found.findings)}</ul>"]
    parts += [figure(panel) for panel in found.panels]
    parts += [_heat(heat) for heat in found.heats]
    parts += [_table(table) for table in found.tables]
    parts += [listed("Before you believe it", found.doubts), listed("Not run", refused)]
    return f"<section>{''.join(parts)}</section>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return (
        f'<p>{escape(table.title)}</p><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>\n"
    )


def _heat(heat: Heat) -> str:
    caption = (
        f"{heat.title}: what is held, oldest tokens at the top, steps from left to right; dashed: the prompt’s end"
    )
    drawn = f'{"".join(_boxes(heat))}<path class="budget" d="M0 {HIGH * heat.prompt:.1f}H{WIDE}"/>'
    x = "".join(f'<span class="{side}" style="left:{at}%">{words}</span>'
                for side, at, words in (("first", 0, "step 1"), ("last", 100, f"{heat.steps:,}")))  # fmt: skip
    return f"""<figure class="heat"><figcaption>{escape(caption)}</figcaption>
<div class="chart"><div class="y"></div><div class="plot">{svg(escape(caption), HIGH, drawn)}</div>
<div class="x">{x}</div></div></figure>"""


def _boxes(heat: Heat) -> Iterator[str]:
    """A rectangle for each run of equal shares in a moment."""
    across, down = WIDE / len(heat.cells), HIGH / len(heat.cells[0])
    for moment, column in enumerate(heat.cells):
        at = 0
        for level, run in groupby(column, key=_level):
            count = len(list(run))
            if level is not None:
                fill = f'fill="{SHADES[0].safe}" fill-opacity="{level / LEVELS:.1f}"' if level else f'fill="{GONE}"'
                yield (
                    f'<rect {fill} x="{moment * across:.1f}" y="{at * down:.1f}" width="{across + 0.3:.1f}" '
                    f'height="{count * down:.1f}"/>'
                )
            at += count


def _level(share: float | None) -> int | None:
    return None if share is None else round(share * LEVELS)


def pictures(told: Outcome) -> dict[str, bytes]:
    """By experiment, its panels as a PNG file; those without a picture are left out.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    drawn = {}
    for experiment in told.suite.experiments:
        found = told.found.get(experiment.name, Found())
        title = f"{experiment.title} ({told.about['model']})"
        if panels := [panel for panel in found.panels if panel.lines]:
            drawn[experiment.name] = panels_png.picture(title, panels, found.upright)
        elif found.heats:
            drawn[experiment.name] = heat_picture(title, found.heats)
    return drawn


def heat_picture(title: str, heats: Sequence[Heat]) -> bytes:
    """Positions of kept tokens by step: a picture for each policy, tokens from top to bottom.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_matplotlib("a PNG picture")
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    size = (3.4 * len(heats) + 0.6, 3.6)
    chart = Figure(figsize=size, dpi=DPI, layout="constrained")
    chart.suptitle(title, fontsize=11)
    shades = LinearSegmentedColormap.from_list("held", [GONE, SHADES[0].ranked, SHADES[0].safe])
    paint = shades.with_extremes(bad=PAPER)
    grid = chart.subplots(1, len(heats), squeeze=False, sharey=True)[0]
    for axes, heat in zip(grid, heats, strict=True):
        cells = np.array([[np.nan if share is None else share for share in column] for column in heat.cells])
        shown = axes.imshow(cells.T, extent=(0, heat.steps, 100, 0), aspect="auto", vmin=0, vmax=1, cmap=paint,
                            interpolation="nearest")  # fmt: skip
        axes.axhline(100 * heat.prompt, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axes.set_title(heat.title, fontsize=9, loc="left")
        axes.set_xlabel("step", fontsize=9)
    grid[0].set_ylabel("token, % of the text (dashed: the prompt ends)", fontsize=9)
    chart.colorbar(shown, ax=list(grid), label="held, of layers and heads", shrink=0.9)
    return png(chart)
