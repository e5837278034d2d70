"""The section of docs/evidence.md about fidelity on outputs that a larger model wrote, from a file of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvpolicy.lab import panels_png
from kvpolicy.lab.bench.tables import Table
from kvpolicy.lab.compare.rows import Row
from kvpolicy.lab.fidelity.measuring import TASK
from kvpolicy.lab.fidelity.panels import by_budget, by_place
from kvpolicy.lab.fidelity.report import COLUMNS, doubts, entries, table
from kvpolicy.lab.suites.base import read_rows
from kvpolicy.lab.suites.markdown import cell, markdown

ROWS = "fidelity.jsonl"

ENOUGH = 20
"""Texts that the section is meant to have."""

NOTHING = "Nothing has been measured yet."

BUDGETS, PLACES = "fidelity-budgets", "fidelity-places"
"""Its pictures."""


def rows_of(folder: Path) -> list[Row]:
    """The rows of fidelity in a folder; none where there is no such file."""
    rows = [Row.from_dict(dict(row)) for row in read_rows(folder / ROWS)]
    return [row for row in rows if row.task == TASK]


def section(folder: Path) -> Iterator[str]:
    """What the rows say so far, part by part."""
    rows = rows_of(folder)
    if not rows:
        yield NOTHING
        return
    found = entries(rows)
    texts = max(entry.said["texts"] for entry in found)
    prompts, outputs = _range(row.prompt_tokens for row in rows), _range(row.new_tokens for row in rows)
    known = ", ".join(f"{name} {version}" for name, version in rows[0].versions.items())
    so_far = "" if texts >= ENOUGH else f" So far {texts} of {ENOUGH} texts."
    yield (
        f"{rows[0].model}, {rows[0].dtype}, is led through outputs that a larger model wrote under its full cache, "
        f"token by token ([eval.md](eval.md)): {texts} texts, prompts of {prompts} tokens, and of each output "
        f"{outputs}; the last command of [papers.md](papers.md) makes such rows. {known}.{so_far}"
    )
    yield f"![KL, same first choice and attention mass kept, by budget](evidence/{BUDGETS}.png)"
    yield f"![The same by place of the output, at {_fullest(rows):,} tokens](evidence/{PLACES}.png)"
    yield markdown(Table("Against the full cache on the same texts (in brackets: 95 %)", COLUMNS, table(found)))
    yield "\n".join(f"- {cell(each)}" for each in doubts(found))


def drawings(folder: Path) -> dict[str, bytes]:
    """Its pictures by name; none without rows.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if not (rows := rows_of(folder)):
        return {}
    found, budget = entries(rows), _fullest(rows)
    title = f"{rows[0].model} beside its full cache on long outputs"
    return {
        BUDGETS: panels_png.picture(title, by_budget(found)),
        PLACES: panels_png.picture(title, by_place(found, budget)),
    }


def _range(counts: Iterable[int]) -> str:
    """`2,912 to 2,945`, or the one number that all are."""
    found = [*counts]
    least, most = min(found), max(found)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _fullest(rows: list[Row]) -> int:
    """The budget at which most policies did something; of several, the smallest."""
    arms = {(row.label, row.budget) for row in rows if row.budget is not None and row.worked}
    count = Counter(budget for _, budget in arms if budget is not None)
    return min(count, key=lambda budget: (-count[budget], budget))
