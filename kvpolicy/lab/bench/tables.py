"""A report as tables of text: the two claims apart, then what a step is made of, then where policies lose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvpolicy.lab.bench.compare import Comparison
from kvpolicy.lab.bench.memory import gigabytes
from kvpolicy.lab.bench.rows import Report, Row


@dataclass(frozen=True)
class Table:
    """A title, names of columns, and rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(report: Report) -> Iterator[Table]:
    """The tables that have rows, in reading order."""
    if report.rows:
        yield latency(report.rows)
        yield substance(report.rows)
    if report.capacities:
        yield capacity(report)
    if report.growths:
        yield growth(report)


def latency(rows: Sequence[Row]) -> Table:
    """Equal batch: how long a step takes, and how many times faster it is than each reference."""
    references = list(dict.fromkeys(name for row in rows for name in row.ratios))
    columns = ["", "batch", "context", "budget", "ms/step", "quartiles", "tokens/s", "prompt ms"]
    columns += [f"× {name}" for name in references]
    return Table(
        "Equal batch: a step (in brackets: what bytes alone would give)", columns,
        [
            [
                *_place(row), f"{row.ms:.2f}", f"{row.quartiles[0]:.2f}–{row.quartiles[1]:.2f}",
                f"{row.tokens_per_second:,.1f}", "–" if row.prompt_ms is None else f"{row.prompt_ms:,.0f}",
                *(
                    f"{row.ratios[name]:.2f} ({row.ideal[name]:.2f})" if name in row.ratios else "–"
                    for name in references
                ),
            ]
            for row in rows
        ],
    )  # fmt: skip


def substance(rows: Sequence[Row]) -> Table:
    """What a step is made of: bytes, launches, graphs; and that the policy was at work."""
    columns = ["", "batch", "context", "budget", "held", "of bandwidth", "peak / plan", "peak", "launches", "a layer",
               "graphs", "recompiles", "compile s", "evicted"]  # fmt: skip
    return Table(
        "What a step is made of", columns,
        [
            [
                *_place(row), f"{row.held:,}", f"{row.roofline:.0%}", f"{row.peak_bytes / row.planned_bytes:.3f}",
                gigabytes(row.peak_bytes), _number(row.launches), _number(row.launches_per_layer), str(row.graphs),
                str(row.recompiles), f"{row.compile_seconds:.1f}", f"{row.evicted:,}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def capacity(report: Report) -> Table:
    """Equal memory: the largest batch, and the tokens a second that it gives."""
    ran = any(row.tokens_per_second is not None for row in report.capacities)
    columns = ["", "context", "budget", "a sequence", "batch that fits", "tokens/s by bytes", "tokens/s", "× dense"]
    return Table(
        f"Equal memory: the largest batch in {gigabytes(report.memory)}" + ("" if ran else " (by the plan, not run)"),
        columns,
        [
            [
                row.label, f"{row.context:,}", "–" if row.budget is None else f"{row.budget:,}",
                gigabytes(row.sequence_bytes), f"{row.batch:,}", f"{row.ideal_tokens_per_second:,.0f}",
                "–" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
                "–" if row.times_dense is None else f"{row.times_dense:.2f}",
            ]
            for row in report.capacities
        ],
    )  # fmt: skip


def growth(report: Report) -> Table:
    """A step after many tokens against one after few."""
    early, late = report.growths[0].seen
    columns = ["", "budget", f"ms after {early:,}", f"ms after {late:,}", "ratio", "evicted"]
    return Table(
        "What a step costs the more a cache has seen", columns,
        [
            [
                row.label, "–" if row.budget is None else f"{row.budget:,}", f"{row.ms[0]:.2f}", f"{row.ms[1]:.2f}",
                f"{row.ratio:.2f}", f"{row.evicted:,}",
            ]
            for row in report.growths
        ],
    )  # fmt: skip


def remarks(report: Report) -> Iterator[str]:
    """What must be said beside the tables: where policies lose, how budgets were given, what arms do differently."""
    losses = list(report.losses())
    if losses:
        yield "Where a policy loses:"
        yield from (f"  {line}" for line in losses)
    told: dict[str, None] = {}
    for row in report.rows:
        if row.settings:
            settings = " ".join(f"--set {name}={value}" for name, value in row.settings.items())
            told[f"{row.label} holds {row.held:,} tokens by {settings}"] = None
        for note in row.notes:
            told[f"{row.label if row.is_policy else row.arm}: {note}"] = None
        if row.prompt_ms is None:
            full = f"{row.arm} at {row.context if row.budget is None else row.budget:,} tokens"
            told[f"{full}: {row.prompt:,} tokens were read, random numbers fill the rest"] = None
    for capacity in report.capacities:
        told.update(dict.fromkeys(f"{capacity.label}: {note}" for note in capacity.notes))
    yield from told
    yield from report.notes
    yield (
        f"{report.model} on {report.device}; a copy moves {report.bandwidth / 1e9:,.1f} GB/s, and a step reads "
        f"{gigabytes(report.weight_bytes)} of weights"
    )


def comparison(found: Comparison, file: str) -> Table:
    """What changed against a saved report."""
    return Table(
        f"Against {file}: ratios, each within its own run", ["", "then", "now", "change", ""],
        [
            [change.what, f"{change.before:.3f}", f"{change.now:.3f}", f"{change.change:+.1%}", "worse" * change.worse]
            for change in found.changes
        ],
    )  # fmt: skip


def _place(row: Row) -> list[str]:
    name = row.label if row.is_policy else row.arm
    return [name, str(row.batch), f"{row.context:,}", "–" if row.budget is None else f"{row.budget:,}"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")
