"""A report as tables of text, as CSV, and the lines that stand beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from kvpolicy.lab.bench.tables import Table
from kvpolicy.lab.compare.arms import FULL
from kvpolicy.lab.compare.report import Entry, Report

COLUMNS = "", "budget", "held", "KiB", "right", "95 %", "against full", "p", "late half", "cut off", "loops", ""
BEST = "◆"
"""Marks an arm on the Pareto front."""

NOTES = (
    f"right: percent of the answers asked for; 95 %: where the true share lies, items drawn; {BEST}: no arm here has "
    "as small a cache and as high a score",
    "against full: right minus the full cache's, the mean over items; p: by swapping signs, with Holm's correction "
    "over the table; late half: right among the answers asked for last",
)


def tables(report: Report) -> Iterator[Table]:
    """One for each task, the full cache first, then what was asked for, then the controls."""
    for task in report.tasks:
        entries = [entry for entry in report.entries if entry.task == task]
        full = entries[0]
        title = f"{task}: {full.items} items, {full.answers} answers"
        yield Table(title, list(COLUMNS), [line(entry) for entry in entries])


def line(entry: Entry) -> list[str]:
    """An entry in words, one for each column."""
    budget = "–" if entry.budget is None else f"{entry.budget:,}"
    head = [entry.label, budget, f"{entry.held:,}", f"{entry.bytes / 1024:,.0f}"]
    ends = [f"{entry.truncated or '–'}", f"{entry.looped or '–'}", BEST if entry.best else ""]
    if entry.score is None:
        return [*head, "never evicted", "–", "–", "–", "–", *ends]
    score = entry.score
    against = "–" if entry.full is None else f"{100 * entry.full.difference:+.1f}"
    p = "–" if entry.p_holm is None else probability(entry.p_holm)
    late = "–" if entry.late is None else percent(entry.late)
    return [*head, percent(score.share), f"{percent(score.low)}–{percent(score.high)}", against, p, late, *ends]


def percent(share: float) -> str:
    """`98.4`, `100`: percent without its sign."""
    return f"{100 * share:.1f}".removesuffix(".0")


def probability(p: float) -> str:
    """`.03`, `<.001`."""
    return (
        "<.001" if p < 0.001 else "1" if p > 0.995 else f"{p:.3f}".lstrip("0") if p < 0.01 else f"{p:.2f}".lstrip("0")
    )


def remarks(report: Report, verdicts: Sequence[str]) -> Iterator[str]:
    """What must be said beside the tables."""
    yield from NOTES
    if verdicts:
        yield ""
        yield "Before you believe it:"
        yield from (f"  {verdict}" for verdict in verdicts)
    if report.refused:
        yield ""
        yield "Not run:"
        yield from (f"  {sentence}" for sentence in refusals(report))
    yield ""
    yield origin(report)


def refusals(report: Report) -> Iterator[str]:
    """A sentence for each reason, with all arms that it holds for."""
    by_reason: dict[tuple[str, str, str], list[str]] = {}
    for (task, label, budget), reason in report.refused.items():
        by_reason.setdefault((task, label, reason), []).append("its own budget" if budget is None else f"{budget:,}")
    for (task, label, reason), budgets in by_reason.items():
        yield f"{task}: {label} at {', '.join(budgets)}: {reason}"


def origin(report: Report) -> str:
    """Where the numbers come from."""
    seeds = ", ".join(map(str, report.seeds))
    known = ", ".join(f"{name} {' and '.join(versions)}" for name, versions in report.versions.items())
    return f"{report.model}, {report.dtype} on {report.device}; greedy; seed {seeds}; {known}"


def as_csv(report: Report) -> str:
    """One line for each entry, with its policy's digest; shares from 0 to 1, empty where nothing is to be reported."""
    file = io.StringIO()
    lines = [_facts(report, entry) for entry in report.entries]
    writer = csv.DictWriter(file, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _facts(report: Report, entry: Entry) -> dict[str, object]:
    score, full, control = entry.score, entry.full, entry.control
    return {
        "model": report.model,
        "dtype": report.dtype,
        "task": entry.task,
        "policy": entry.label,
        "digest": entry.digest,
        "budget": entry.budget,
        "settings": " ".join(f"{name}={value}" for name, value in entry.settings.items()),
        "items": entry.items,
        "answers": entry.answers,
        "right": score and score.share,
        "low": score and score.low,
        "high": score and score.high,
        "early": entry.early,
        "late": entry.late,
        "against_full": full and full.difference,
        "p": full and full.p,
        "p_holm": entry.p_holm,
        "against_random": control and control.difference,
        "p_random": control and control.p,
        "held": entry.held,
        "bytes": entry.bytes,
        "resident": entry.resident,
        "evicted": entry.evicted,
        "new_tokens": entry.new_tokens,
        "worked": entry.worked,
        "truncated": entry.truncated,
        "looped": entry.looped,
        "best": int(entry.best),
        "full": int(entry.label == FULL),
        "seeds": " ".join(map(str, report.seeds)),
        **{name: " ".join(versions) for name, versions in report.versions.items()},
    }
