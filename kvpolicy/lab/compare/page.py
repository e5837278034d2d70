"""A report as one HTML file that needs nothing beside it, and no JavaScript."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kvpolicy.lab.compare.arms import FULL
from kvpolicy.lab.compare.curves import panels
from kvpolicy.lab.compare.report import Entry, Report, controls
from kvpolicy.lab.compare.tables import COLUMNS, NOTES, line, origin, refusals
from kvpolicy.lab.panels import Panel
from kvpolicy.lab.panels_svg import figure, style
from kvpolicy.lab.web_page import document


def page(report: Report, verdicts: Sequence[str]) -> str:
    """The page: verdicts first, then a picture and a table for every task; all that came from outside is escaped."""
    labels = dict.fromkeys(entry.label for entry in report.entries if entry.label not in {FULL, *controls()})
    header = f"""<h1>{escape(", ".join(labels) or FULL)}: right answers on {escape(report.model)}</h1>
<p class="faint">{escape(origin(report))}</p>
{listed("Before you believe it", verdicts)}"""
    sections = "\n".join(
        _section(task, panel, report) for task, panel in zip(report.tasks, panels(report), strict=True)
    )
    notes = "".join(f'<p class="faint">{escape(note)}</p>' for note in NOTES)
    after = listed("Not run", list(refusals(report))) + f"<p class='faint'>{escape(report.command)}</p>"
    return document(f"{', '.join(labels)} on {report.model}", header, sections + notes + after, style=style())


def listed(title: str, sentences: Sequence[str]) -> str:
    """Sentences under a title; nothing where there are none."""
    if not sentences:
        return ""
    told = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h2>{escape(title)}</h2>\n<ul>{told}</ul>\n"


def _section(task: str, panel: Panel, report: Report) -> str:
    entries = [entry for entry in report.entries if entry.task == task]
    title = f"{task}: {entries[0].items} items, {entries[0].answers} answers"
    drawn = figure(panel) if panel.lines else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{drawn}{table(entries)}</section>"


def table(entries: Sequence[Entry]) -> str:
    """All numbers of a task; a row's settings show where it is pointed at."""
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    rows = []
    for entry in entries:
        kind = "full-row" if entry.label == FULL else "control-row" if entry.label in controls() else ""
        settings = " ".join(f"--set {name}={value}" for name, value in entry.settings.items())
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in line(entry))
        rows.append(f'<tr class="{kind}" title="{escape(f"{entry.digest[:12]} {settings}".strip())}">{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>\n'
