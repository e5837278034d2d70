"""Fidelity as one HTML file that needs nothing beside it, and no JavaScript."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kvpolicy.lab.compare.arms import FULL
from kvpolicy.lab.compare.page import listed
from kvpolicy.lab.compare.report import controls
from kvpolicy.lab.fidelity.panels import budgets_of, by_budget, by_place
from kvpolicy.lab.fidelity.report import COLUMNS, Entry, doubts, table
from kvpolicy.lab.panels import Panel
from kvpolicy.lab.panels_svg import figure, style
from kvpolicy.lab.web_page import document

STYLE = """.beside { display: grid; gap: 0 2rem; }
@media (min-width: 60rem) { .beside { grid-template-columns: repeat(auto-fit, minmax(25rem, 1fr)); } }
figure { margin: 0 0 1.2rem; }
"""

NOTES = (
    "Every arm is led through the same outputs, token by token, and held against the full cache at every place.",
    "KL early and KL late are those of the first and the last tenth of the output. Intervals come from a bootstrap "
    "over texts, and within a text over blocks of 64 places.",
    "Mass kept: of the softmax that a query would give to all tokens so far, by this run’s own queries and keys, the "
    "share on tokens that were left to it, and read; the mean over layers and query heads, at every 16th place.",
)


def page(model: str, found: Sequence[Entry], refused: Sequence[str] = (), command: str = "") -> str:
    """The page: doubts first, then curves over budgets, then at each budget by place, and a table of all numbers; all
    that came from outside is escaped. ``refused``: a sentence for each arm that could not run."""
    labels = list(dict.fromkeys(entry.label for entry in found if entry.label not in {FULL, *controls()}))
    texts = max(entry.said["texts"] for entry in found)
    places = max(entry.said["places"] for entry in found)
    title = f"{', '.join(labels) or FULL}: fidelity to the full cache on {model}"
    header = f"""<h1>{escape(title)}</h1>
<p class="faint">{texts} texts, {places:,} tokens of their outputs</p>
{listed("Before you believe it", list(doubts(found)))}"""
    sections = [_section("By budget", _beside(by_budget(found)))]
    for budget in budgets_of(found):
        named = "at the policies’ own budgets" if budget is None else f"at {budget:,} tokens"
        sections.append(_section(f"Along the output, {named}", _beside(by_place(found, budget))))
    sections.append(_section("All numbers", _table(found)))
    notes = "".join(f'<p class="faint">{escape(note)}</p>' for note in NOTES)
    after = listed("Not run", list(refused)) + (f"<p class='faint'>{escape(command)}</p>" if command else "")
    return document(title, header, "\n".join(sections) + notes + after, style=style() + STYLE)


def _beside(panels: Sequence[Panel]) -> str:
    """Drawings beside one another where there is room; nothing where there are none."""
    return f'<div class="beside">{"".join(map(figure, panels))}</div>' if panels else ""


def _section(title: str, inside: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}</section>" if inside else ""


def _table(found: Sequence[Entry]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    rows = []
    for entry, line in zip(found, table(found), strict=True):
        kind = "full-row" if entry.label == FULL else "control-row" if entry.label in controls() else ""
        settings = " ".join(f"--set {name}={value}" for name, value in entry.settings.items())
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in line)
        rows.append(f'<tr class="{kind}" title="{escape(f"{entry.digest[:12]} {settings}".strip())}">{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>\n'
