"""All that a file of rows says of fidelity, for whoever writes about it: a table, panels for pictures, and doubts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpolicy.lab.compare.rows import read
from kvpolicy.lab.fidelity.panels import by_budget, by_place
from kvpolicy.lab.fidelity.report import COLUMNS, Entry, doubts, entries, table
from kvpolicy.lab.panels import Panel


@dataclass(frozen=True)
class Told:
    """What there is to say.

    texts, places: the most of any arm. columns, lines: a table of words, a line for each arm. over_budgets, along:
    panels of KL, top-1 and, where it was measured, attention mass; ``along`` by budget, None: the policies' own.
    """

    entries: Sequence[Entry]
    texts: int
    places: int
    columns: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]
    over_budgets: Sequence[Panel]
    along: Mapping[int | None, Sequence[Panel]]
    doubts: Sequence[str]


def told(path: Path, *, model: str | None = None, points: int = 10) -> Told:
    """Read the rows of fidelity in a file; of one model, where it has rows of several.

    Raises:
        UsageError: the file cannot be read, or has no such rows.
    """
    found = entries([row for row in read(path) if model in (None, row.model)], points=points)
    budgets = sorted({entry.budget for entry in found if entry.worked}, key=lambda budget: budget or 0)
    return Told(
        found,
        max(entry.said["texts"] for entry in found),
        max(entry.said["places"] for entry in found),
        COLUMNS,
        table(found),
        by_budget(found),
        {budget: panels for budget in budgets if (panels := by_place(found, budget))},
        list(doubts(found)),
    )
