"""Whether to believe a report: sentences that a reader needs before its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from kvpolicy.lab.compare.arms import FULL
from kvpolicy.lab.compare.report import Entry, Report, against, controls
from kvpolicy.lab.compare.rows import Row

LEVEL = 0.05
"""A difference counts where one as large would come by chance less often."""

FEW = 8
"""Items below which hardly any difference can count."""

LUCK = 0.2
"""Chance above which scores must be read against it."""


def verdicts(report: Report, rows: Sequence[Row]) -> Iterator[str]:
    """A sentence for everything that the numbers alone would hide."""
    for task in report.tasks:
        entries = [entry for entry in report.entries if entry.task == task]
        of_task = [row for row in rows if row.task == task]
        yield from _of_the_task(entries[0], report.chance[task])
        yield from _idle(entries)
        for each in beyond((entry.label, entry.budget, entry.held) for entry in entries):
            yield f"{task}: {each}"
        yield from _ends(entries, "cut off before all was answered", lambda entry: entry.truncated)
        yield from _ends(entries, "going round in circles", lambda entry: entry.looped)
        for label in dict.fromkeys(entry.label for entry in entries if entry.label != FULL):
            known = [entry for entry in entries if entry.label == label and entry.score is not None]
            yield from _beside_random(known)
            yield from _over_budgets(known, of_task)
    for name, known_versions in report.versions.items():
        if len(known_versions) > 1:
            yield f"rows were made by several versions of {name}: {', '.join(known_versions)}"


def _of_the_task(full: Entry, chance: float) -> Iterator[str]:
    """Whether the task says anything of this model."""
    assert full.score is not None
    if full.score.low <= chance:
        yield (
            f"{full.task}: the full cache is right {full.score.share:.0%} of the time, no more than by chance "
            f"({chance:.0%}): this model cannot do the task, and nothing here speaks of policies"
        )
    elif full.score.share < 0.5:
        yield f"{full.task}: the full cache itself is right only {full.score.share:.0%} of the time"
    if chance > LUCK:
        yield f"{full.task}: {chance:.0%} would be right by chance, graded against another item's answers"
    if full.items < FEW:
        yield f"{full.task}: {full.items} items are too few to tell policies apart; give more with --items"


def _idle(entries: Sequence[Entry]) -> Iterator[str]:
    """Policies that did nothing, or only now and then."""
    for entry in entries:
        if entry.score is None:
            yield (
                f"{entry.task}: {entry.name} never evicted or skipped a token; its score would be the full cache's and "
                "is not reported"
            )
        elif entry.label != FULL and entry.worked < entry.items:
            yield (
                f"{entry.task}: {entry.name} was at work in {entry.worked} of {entry.items} texts; the others were too "
                "short"
            )


def beyond(told: Iterable[tuple[str, int | None, int]]) -> Iterator[str]:
    """A sentence for each label that holds more than its budget, of (label, budget, held): it is no match for others of
    the same budget."""
    found: dict[str, dict[int, int]] = {}
    for label, budget, held in told:
        if budget is not None and held > budget:
            found.setdefault(label, {})[budget] = held
    for label, holds in found.items():
        places = ", ".join(f"{held:,} tokens at {budget:,}" for budget, held in holds.items())
        yield f"{label} holds more than its budget, which is of what it reads or of its prompt alone: {places}"


def _ends(entries: Sequence[Entry], what: str, count: Callable[[Entry], int]) -> Iterator[str]:
    """Outputs that did not end well, of the full cache, and of policies where there are more."""
    full = entries[0]
    if count(full):
        yield f"{full.task}: {count(full)} of {full.items} outputs of the full cache were {what}"
    for label in dict.fromkeys(entry.label for entry in entries[1:] if entry.label not in controls()):
        more = [entry for entry in entries if entry.label == label and count(entry) > count(full)]
        if more:
            counts = ", ".join(str(count(entry)) for entry in more)
            places = ", ".join(f"{entry.budget:,}" for entry in more if entry.budget is not None)
            told = f"{counts} of {full.items}" + (f" at {places}" if places else "")
            yield f"{full.task}: {label} has more outputs {what} than the full cache: {told}"


def _beside_random(entries: Sequence[Entry]) -> Iterator[str]:
    """``entries`` are of one label."""
    held = [(entry, entry.control) for entry in entries if entry.control is not None]
    for entry, control in held:
        if control.difference < 0 and control.p < LEVEL:
            yield (
                f"{entry.task}: {entry.name} is worse than dropping tokens at random, by {-control.difference:.0%} "
                f"(p = {control.p:.2g})"
            )
    if held and not any(control.difference > 0 and control.p < LEVEL for _, control in held):
        yield f"{held[0][0].task}: {held[0][0].label} is nowhere better than dropping tokens at random"


def _over_budgets(entries: Sequence[Entry], rows: Sequence[Row]) -> Iterator[str]:
    """Whether scores move with the budget, and upwards. ``entries`` are of one label, by budget."""
    if len(entries) < 2 or entries[0].label in controls():
        return
    of = [[row for row in rows if (row.label, row.budget) == (entry.label, entry.budget)] for entry in entries]
    where = f"{entries[0].task}: {entries[0].label}"
    for (less, low), (more, high) in pairwise(zip(entries, of, strict=True)):
        found = against(high, low)
        if found is not None and found.difference < 0 and found.p < LEVEL:
            yield (
                f"{where} is worse at {more.budget:,} tokens than at {less.budget:,}, by {-found.difference:.0%} "
                f"(p = {found.p:.2g})"
            )
    ends = against(of[-1], of[0])
    if ends is None or ends.p < LEVEL or _like_the_full_cache(entries):
        return
    outputs = [[row.output for row in sorted(each, key=lambda row: row.number)] for each in of]
    if all(each == outputs[0] for each in outputs):
        yield f"{where} writes the very same at every budget: the budget may not reach it"
    else:
        yield (
            f"{where} does not move with the budget: from {entries[0].budget:,} to {entries[-1].budget:,} tokens it "
            f"gains {ends.difference:+.0%}, which may be chance (p = {ends.p:.2g})"
        )


def _like_the_full_cache(entries: Sequence[Entry]) -> bool:
    """Whether none of them is told from the full cache: then there is no room to move."""
    return all(entry.full is not None and entry.full.p >= LEVEL for entry in entries)
