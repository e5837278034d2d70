"""Panels as HTML with drawings in SVG, for pages that need nothing beside them."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files

from kvpolicy.lab.drawing import WIDE, svg
from kvpolicy.lab.panels import Line, Panel, Point, aside

HIGH = 420
"""Units of a drawing, which is WIDE."""

ROOM = 0.14
"""Of the distance between two places, how far points are moved aside at the most."""

SIZE = 9
"""Half the width of a marker."""


def style() -> str:
    """The CSS that a page with panels needs."""
    return files("kvpolicy.lab").joinpath("panels.css").read_text(encoding="utf-8")


def figure(panel: Panel) -> str:
    """The drawing with its axes; the words are HTML, so that they stay readable however small the drawing."""
    y = "".join(
        f'<span style="top:{100 * _y(part) / HIGH:.1f}%">{escape(words)}</span>'
        for part, words in reversed(panel.axis.marks)
    )
    x = "".join(
        f'<span style="left:{100 * _x(place, panel) / WIDE:.1f}%">{escape(words)}</span>'
        for place, words in enumerate(panel.places)
    )
    legend = "".join(_key(line) for line in panel.lines)
    if panel.full is not None:
        full = '<svg viewBox="0 0 60 30" aria-hidden="true"><path class="full" d="M0 15H60"/></svg>full cache'
        legend = f"<li>{full}</li>{legend}"
    return f"""<figure>
<figcaption>{escape(panel.caption)}</figcaption>
<ul class="legend">{legend}</ul>
<div class="chart"><div class="y">{y}</div>
<div class="plot">{svg(escape(panel.caption), HIGH, "".join(_drawn(panel)))}</div>
<div class="x">{x}</div></div>
</figure>
"""


def _key(line: Line) -> str:
    dashes = "curve control" if line.control else "curve"
    drawn = f'<path class="{dashes}" stroke="{line.colour}" d="M0 15H60"/>{_marker(line, 30, 15)}'
    return f'<li><svg class="ink" viewBox="0 0 60 30" aria-hidden="true">{drawn}</svg>{escape(line.label)}</li>'


def _drawn(panel: Panel) -> Iterator[str]:
    for part, _ in panel.axis.marks[1:-1]:
        yield f'<line class="grid" x1="0" x2="{WIDE}" y1="{_y(part):.1f}" y2="{_y(part):.1f}"/>'
    if panel.full is not None:
        top, low = (_y(panel.axis.part(each)) for each in (panel.full.high, panel.full.low))
        yield f'<rect class="band" x="0" width="{WIDE}" y="{top:.1f}" height="{max(0.0, low - top):.1f}"/>'
        yield f'<path class="full" d="M0 {_y(panel.axis.part(panel.full.value)):.1f}H{WIDE}"/>'
    for line, moved in zip(panel.lines, aside(panel.lines), strict=True):
        yield f'<g class="ink">{"".join(_line(line, moved, panel))}</g>'


def _line(line: Line, moved: float, panel: Panel) -> Iterator[str]:
    def place(point: Point, value: float) -> tuple[float, float]:
        return _x(point.at + ROOM * moved, panel), _y(panel.axis.part(value))

    path = "L".join("{:.1f} {:.1f}".format(*place(point, point.value)) for point in line.points)
    yield f'<path class="{"curve control" if line.control else "curve"}" stroke="{line.colour}" d="M{path}"/>'
    for point in line.points:
        x, y = place(point, point.value)
        reach = f"M{x:.1f} {place(point, point.low)[1]:.1f}V{place(point, point.high)[1]:.1f}"
        yield (
            f'<g><title>{escape(point.words)}</title><path class="reach" stroke="{line.colour}" d="{reach}"/>'
            f"{_marker(line, x, y)}</g>"
        )


def _marker(line: Line, x: float, y: float) -> str:
    """A closed shape around a point; that of a control is hollow."""
    half = SIZE
    shapes = {
        "circle": f"M{x - half:.1f} {y:.1f}a{half} {half} 0 1 0 {2 * half} 0a{half} {half} 0 1 0 {-2 * half} 0z",
        "square": f"M{x - half:.1f} {y - half:.1f}h{2 * half}v{2 * half}h{-2 * half}z",
        "triangle": f"M{x:.1f} {y - half:.1f}l{half} {2 * half}h{-2 * half}z",
        "diamond": f"M{x:.1f} {y - half - 2:.1f}l{half + 2} {half + 2}l{-half - 2} {half + 2}l{-half - 2} {-half - 2}z",
    }
    fill = 'class="hollow"' if line.control else f'fill="{line.colour}"'
    return f'<path {fill} stroke="{line.colour}" stroke-width="1.6" d="{shapes[line.marker]}"/>'


def _x(place: float, panel: Panel) -> float:
    """Places evenly spaced, half a space at both ends."""
    return WIDE * (place + 0.5) / len(panel.places)


def _y(part: float) -> float:
    """The top of the axis stands a marker below the edge, its bottom as much above the other."""
    return 14 + (HIGH - 28) * (1 - part)
