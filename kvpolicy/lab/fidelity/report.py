"""What the rows of fidelity say of every arm: numbers with their intervals, curves, and what to doubt."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvpolicy.errors import UsageError
from kvpolicy.lab.compare.arms import FULL
from kvpolicy.lab.compare.rows import Row
from kvpolicy.lab.compare.verdicts import beyond
from kvpolicy.lab.fidelity.forcing import BLOCK, MASS, MEASURES
from kvpolicy.lab.fidelity.measuring import TASK
from kvpolicy.lab.fidelity.summary import Blocks, summary

FEW = 8
"""Texts below which an interval says little of other texts."""

ITSELF = 1e-3
"""Above this KL, in nats, the full cache in kvpolicy's slots is not the model's own: something is broken."""


@dataclass(frozen=True)
class Entry:
    """An arm. said: what ``summary`` gave. worked: texts in which the policy did anything; held, bytes: as in rows;
    resident: the most of any text; evicted: the mean."""

    label: str
    budget: int | None
    settings: dict[str, str]
    digest: str
    held: int
    bytes: int
    resident: int
    evicted: float
    worked: int
    said: dict[str, Any]

    @property
    def name(self) -> str:
        """`h2o at 64`."""
        return self.label if self.budget is None else f"{self.label} at {self.budget:,}"

    def to_dict(self) -> dict[str, Any]:
        told = asdict(self)
        return told | told.pop("said")


def entries(rows: Sequence[Row], *, points: int = 10) -> list[Entry]:
    """An entry for each arm, in the order of the rows.

    Args:
        points: of the curves by place.

    Raises:
        UsageError: there is no row of fidelity.
    """
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        if row.task == TASK:
            groups.setdefault((row.label, row.budget), []).append(row)
    if not groups:
        raise UsageError("no rows of fidelity to report; give texts with --dataset")
    return [_entry(group, points) for group in groups.values()]


def blocks_of(rows: Sequence[Row]) -> Blocks:
    """The blocks of rows of one arm."""
    counts = [[int(places) for places in row.measures["places"]] for row in rows]
    sums = [
        {
            name: [mean * places for mean, places in zip(row.measures[name], row.measures["places"], strict=True)]
            for name in MEASURES
        }
        for row in rows
    ]
    return Blocks.of(counts, sums, BLOCK)


def mass_of(rows: Sequence[Row]) -> Blocks | None:
    """The blocks of the attention mass kept; None where some row has it not, or nowhere."""
    if not all(sum(row.measures.get("mass_places", ())) for row in rows):
        return None
    counts = [[int(places) for places in row.measures["mass_places"]] for row in rows]
    sums = [
        {MASS: [mean * places for mean, places in zip(row.measures[MASS], row.measures["mass_places"], strict=True)]}
        for row in rows
    ]
    return Blocks.of(counts, sums, BLOCK)


def _entry(rows: Sequence[Row], points: int) -> Entry:
    first = rows[0]
    return Entry(
        first.label,
        first.budget,
        first.settings,
        first.digest,
        first.held,
        max(row.bytes for row in rows),
        max(row.resident for row in rows),
        sum(row.evicted for row in rows) / len(rows),
        sum(row.worked for row in rows),
        summary(blocks_of(rows), mass_of(rows), points=points),
    )


def doubts(found: Sequence[Entry]) -> Iterator[str]:
    """A sentence for everything that the numbers alone would hide."""
    for entry in found:
        texts = entry.said["texts"]
        if entry.label == FULL:
            if entry.said["kl"]["value"] > ITSELF:
                yield f"{FULL} differs from the model's own cache by {entry.said['kl']['value']:.2g} nats: report it"
        elif not entry.worked:
            yield f"{entry.name} never evicted anything: its numbers are the full cache's, and say nothing of it"
        elif entry.worked < texts:
            yield f"{entry.name} did nothing in {texts - entry.worked} of {texts} texts"
    yield from beyond((entry.label, entry.budget, entry.held) for entry in found)
    if found and found[0].said["texts"] < FEW:
        yield f"{found[0].said['texts']} texts: intervals say how these vary, and little of others"
    if len({entry.said["places"] for entry in found}) > 1:
        yield "arms are not on the same texts: the run was cut short; run it again to fill the gaps"


COLUMNS = ("policy", "budget", "held", "KL, nats", "top-1", "perplexity", "KL early", "KL late", "mass kept", "evicted")


def table(found: Sequence[Entry]) -> list[tuple[str, ...]]:
    """A line of text for each arm, under ``COLUMNS``. An arm that did nothing has no numbers."""
    lines: list[tuple[str, ...]] = []
    for entry in found:
        said = entry.said
        idle = entry.label != FULL and not entry.worked
        curve = said["curves"]["kl"]
        numbers = (
            _between(said["kl"], ".3g"),
            _between(said["top1"], ".1%"),
            _between(said["perplexity"], ".3f"),
            f"{curve[0]['value']:.3g}",
            f"{curve[-1]['value']:.3g}",
            _between(said["mass"], ".1%") if "mass" in said else "–",
        )
        budget = "–" if entry.budget is None else f"{entry.budget:,}"
        shown = ("never evicted", *["–"] * (len(numbers) - 1)) if idle else numbers
        lines.append((entry.label, budget, f"{entry.held:,}", *shown, f"{entry.evicted:,.0f}"))
    return lines


def as_csv(found: Sequence[Entry]) -> str:
    """A line for each arm, measure and part of the output; ``all`` is the whole of it."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["policy", "budget", "held", "evicted", "measure", "from", "to", "value", "low", "high"])
    for entry in found:
        arm = [entry.label, "" if entry.budget is None else entry.budget, entry.held, f"{entry.evicted:.0f}"]
        for name in ("kl", "top1", "perplexity", "full_perplexity", MASS):
            if name in entry.said:
                lines.writerow([*arm, name, "all", "all", *entry.said[name].values()])
        for name, curve in entry.said["curves"].items():
            for part in curve:
                lines.writerow([*arm, name, *part.values()])
    return file.getvalue()


def _between(said: dict[str, float], form: str) -> str:
    return f"{said['value']:{form}} ({said['low']:{form}}–{said['high']:{form}})"
