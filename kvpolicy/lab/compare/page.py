"""A report as one HTML file that needs nothing beside it, and no JavaScript."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files

from kvpolicy.lab.compare.arms import FULL
from kvpolicy.lab.compare.curves import Curve, Panel, aside, panels
from kvpolicy.lab.compare.report import Entry, Report, controls
from kvpolicy.lab.compare.tables import COLUMNS, NOTES, line, origin, refusals
from kvpolicy.lab.drawing import WIDE, svg
from kvpolicy.lab.web_page import document

HIGH = 420
"""Units of a drawing, which is WIDE."""

ROOM = 0.14
"""Of the distance between two budgets, how far points are moved aside at the most."""

SIZE = 9
"""Half the width of a marker."""


def page(report: Report, verdicts: Sequence[str]) -> str:
    """The page: verdicts first, then a picture and a table for every task; all that came from outside is escaped."""
    labels = dict.fromkeys(entry.label for entry in report.entries if entry.label not in {FULL, *controls()})
    header = f"""<h1>{escape(", ".join(labels) or FULL)}: right answers on {escape(report.model)}</h1>
<p class="faint">{escape(origin(report))}</p>
{_list("Before you believe it", verdicts)}"""
    style = files("kvpolicy.lab.compare").joinpath("page.css").read_text(encoding="utf-8")
    sections = "\n".join(_section(panel, report) for panel in panels(report))
    notes = "".join(f'<p class="faint">{escape(note)}</p>' for note in NOTES)
    after = _list("Not run", list(refusals(report))) + f"<p class='faint'>{escape(report.command)}</p>"
    return document(f"{', '.join(labels)} on {report.model}", header, sections + notes + after, style=style)


def _list(title: str, sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    told = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h2>{escape(title)}</h2>\n<ul>{told}</ul>\n"


def _section(panel: Panel, report: Report) -> str:
    entries = [entry for entry in report.entries if entry.task == panel.task]
    title = f"{panel.task}: {panel.full.items} items, {panel.full.answers} answers"
    drawn = _figure(panel) if panel.curves else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{drawn}{_table(entries)}</section>"


def _table(entries: Sequence[Entry]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    rows = []
    for entry in entries:
        kind = "full-row" if entry.label == FULL else "control-row" if entry.label in controls() else ""
        settings = " ".join(f"--set {name}={value}" for name, value in entry.settings.items())
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in line(entry))
        rows.append(f'<tr class="{kind}" title="{escape(f"{entry.digest[:12]} {settings}".strip())}">{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>\n'


def _figure(panel: Panel) -> str:
    """The drawing with its axes; the words are HTML, so that they stay readable however small the drawing."""
    y = "".join(
        f'<span style="top:{100 * _y(share) / HIGH:.1f}%">{100 * share:.0f} %</span>'
        for share in (1, 0.75, 0.5, 0.25, 0)
    )
    x = "".join(
        f'<span style="left:{100 * _x(place, panel) / WIDE:.1f}%">{budget:,}</span>'
        for place, budget in enumerate(panel.budgets)
    )
    legend = "".join(_key(curve) for curve in panel.curves)
    full = '<svg viewBox="0 0 60 30" aria-hidden="true"><path class="full" d="M0 15H60"/></svg>full cache'
    return f"""<figure>
<figcaption>Right answers by budget in tokens, with 95 % intervals; grey band: the full cache’s</figcaption>
<ul class="legend"><li>{full}</li>{legend}</ul>
<div class="chart"><div class="y">{y}</div>
<div class="plot">{svg(f"Right answers by budget on {escape(panel.task)}", HIGH, "".join(_drawn(panel)))}</div>
<div class="x">{x}</div></div>
</figure>
"""


def _key(curve: Curve) -> str:
    dashes = "curve control" if curve.control else "curve"
    drawn = f'<path class="{dashes}" stroke="{curve.colour}" d="M0 15H60"/>{_marker(curve, 30, 15)}'
    return f'<li><svg class="ink" viewBox="0 0 60 30" aria-hidden="true">{drawn}</svg>{escape(curve.label)}</li>'


def _drawn(panel: Panel) -> Iterator[str]:
    score = panel.full.score
    for share in (0.25, 0.5, 0.75):
        yield f'<line class="grid" x1="0" x2="{WIDE}" y1="{_y(share):.1f}" y2="{_y(share):.1f}"/>'
    if score is not None:
        top, low = _y(score.high), _y(score.low)
        yield f'<rect class="band" x="0" width="{WIDE}" y="{top:.1f}" height="{max(0.0, low - top):.1f}"/>'
        yield f'<path class="full" d="M0 {_y(score.share):.1f}H{WIDE}"/>'
    moved = aside(panel.curves)
    for curve in panel.curves:
        points = [
            (_x(panel.budgets.index(entry.budget or 0) + ROOM * moved[curve.label], panel), entry.score, entry)
            for entry in curve.entries
        ]
        path = "L".join(f"{x:.1f} {_y(found.share):.1f}" for x, found, _ in points if found is not None)
        kind = "curve control" if curve.control else "curve"
        drawn = [f'<path class="{kind}" stroke="{curve.colour}" d="M{path}"/>']
        for x, found, entry in points:
            if found is not None:
                reach = f"M{x:.1f} {_y(found.low):.1f}V{_y(found.high):.1f}"
                words = f"{entry.name}: {found.share:.1%} ({found.low:.1%} to {found.high:.1%})"
                drawn.append(
                    f'<g><title>{escape(words)}</title><path class="reach" stroke="{curve.colour}" d="{reach}"/>'
                    f"{_marker(curve, x, _y(found.share))}</g>"
                )
        yield f'<g class="ink">{"".join(drawn)}</g>'


def _marker(curve: Curve, x: float, y: float) -> str:
    """A closed shape around a point; that of a control is hollow."""
    half = SIZE
    shapes = {
        "circle": f"M{x - half:.1f} {y:.1f}a{half} {half} 0 1 0 {2 * half} 0a{half} {half} 0 1 0 {-2 * half} 0z",
        "square": f"M{x - half:.1f} {y - half:.1f}h{2 * half}v{2 * half}h{-2 * half}z",
        "triangle": f"M{x:.1f} {y - half:.1f}l{half} {2 * half}h{-2 * half}z",
        "diamond": f"M{x:.1f} {y - half - 2:.1f}l{half + 2} {half + 2}l{-half - 2} {half + 2}l{-half - 2} {-half - 2}z",
    }
    fill = 'class="hollow"' if curve.control else f'fill="{curve.colour}"'
    return f'<path {fill} stroke="{curve.colour}" stroke-width="1.6" d="{shapes[curve.marker]}"/>'


def _x(place: float, panel: Panel) -> float:
    """Budgets evenly spaced, half a space at both ends."""
    return WIDE * (place + 0.5) / len(panel.budgets)


def _y(share: float) -> float:
    """100 % stands a marker below the top, 0 % as much above the bottom."""
    return 14 + (HIGH - 28) * (1 - share)
