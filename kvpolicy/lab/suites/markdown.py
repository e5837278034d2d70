"""Tables as Markdown."""

from __future__ import annotations

from kvpolicy.lab.bench.tables import Table


def markdown(told: Table) -> str:
    """A table, its title above it."""
    lines = [f"| {' | '.join(map(cell, told.columns))} |", f"| {' | '.join('---' for _ in told.columns)} |"]
    lines += [f"| {' | '.join(map(cell, row))} |" for row in told.rows]
    return f"{told.title}:\n\n" + "\n".join(lines)


def cell(text: str) -> str:
    """Text that stands in one cell, or in one line."""
    return text.replace("|", "\\|").replace("\n", " ")
