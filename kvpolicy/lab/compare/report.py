"""What rows say: for each arm on each task a score with its interval, and verdicts on whether to believe it.

Everything here is computed from rows, so a report can be made again from the file that a run left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from kvpolicy.errors import UsageError
from kvpolicy.lab.compare.arms import CONTROLS, FULL
from kvpolicy.lab.compare.rows import Row
from kvpolicy.lab.compare.statistics import Interval, Paired, front, holm, interval, paired
from kvpolicy.lab.tasks.base import Task

Place = tuple[str, str, int | None]
"""Task, label, budget: where an arm's rows stand in a report."""


@dataclass
class Entry:
    """An arm on a task.

    Attributes:
        score: None where the policy did nothing, so that its score would be the full cache's.
        early, late: shares right of the answers asked for first and last, a half each; None where there is but one.
        full: against the full cache; p_holm: its p beside all the other tests of this task. control: against the random
            control at the same budget. None where there is nothing to hold it against.
        held: tokens after an update, by the plan; bytes: of the cache of one text. evicted, new_tokens: the mean.
        worked, truncated, looped: items.
        best: no arm has as small a cache and as high a score.
    """

    task: str
    label: str
    digest: str
    budget: int | None
    settings: dict[str, str]
    items: int
    answers: int
    score: Interval | None
    early: float | None
    late: float | None
    full: Paired | None
    p_holm: float | None
    control: Paired | None
    held: int
    bytes: int
    resident: int
    evicted: float
    new_tokens: float
    worked: int
    truncated: int
    looped: int
    best: bool = False

    @property
    def name(self) -> str:
        """`h2o at 64`."""
        return self.label if self.budget is None else f"{self.label} at {self.budget:,}"


@dataclass
class Report:
    """Of one run.

    refused: arms that could not run, with the reason. chance: by task, the share right by luck, see ``chance``.
    """

    model: str
    entries: list[Entry] = field(default_factory=list)
    refused: dict[Place, str] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    versions: dict[str, list[str]] = field(default_factory=dict)
    dtype: str = ""
    device: str = ""
    command: str = ""

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(entry.task for entry in self.entries))

    def to_dict(self) -> dict[str, Any]:
        told = asdict(self)
        told["refused"] = [
            {"task": task, "label": label, "budget": budget, "reason": reason}
            for (task, label, budget), reason in self.refused.items()
        ]
        return told


def report(
    rows: Sequence[Row],
    tasks: Mapping[str, Task],
    *,
    refused: Mapping[Place, str] | None = None,
    device: str = "",
    command: str = "",
) -> Report:
    """What scored rows say.

    Args:
        tasks: by name, those that the rows are of; with them outputs are graded against other items' answers as well.

    Raises:
        UsageError: there are no scored rows, or the full cache is not among them.
    """
    rows = [row for row in rows if row.right]
    if not rows:
        raise UsageError("no scored rows to report; run kvpolicy compare first")
    found = Report(
        rows[0].model,
        refused=dict(refused or {}),
        seeds=sorted({row.seed for row in rows}),
        versions={
            name: sorted({row.versions.get(name, "?") for row in rows})
            for name in dict.fromkeys(name for row in rows for name in row.versions)
        },
        dtype=rows[0].dtype,
        device=device,
        command=command,
    )
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        entries = _entries(task, of_task)
        found.entries += entries
        found.chance[task] = chance(tasks[task], of_task)
    return found


def _entries(task: str, rows: Sequence[Row]) -> list[Entry]:
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.number):
        groups.setdefault((row.label, row.budget), []).append(row)
    full = groups.get((FULL, None))
    if full is None:
        raise UsageError(f"the full cache has no rows on the task {task}, and every other is held against it")
    order = sorted(groups, key=lambda key: (key[0] != FULL, key[0] in controls(), key[0], key[1] or 0))
    entries = [_entry(task, label, budget, groups, full) for label, budget in order]
    tested = [entry for entry in entries if entry.full is not None]
    for entry, raised in zip(tested, holm([entry.full.p for entry in tested if entry.full]), strict=True):
        entry.p_holm = raised
    scored = [entry for entry in entries if entry.score is not None]
    points = [(float(entry.bytes), entry.score.share) for entry in scored if entry.score]
    for entry, best in zip(scored, front(points), strict=True):
        entry.best = best
    return entries


def _entry(
    task: str, label: str, budget: int | None, groups: Mapping[tuple[str, int | None], list[Row]], full: list[Row]
) -> Entry:
    rows = groups[label, budget]
    worked = sum(row.worked for row in rows)
    shown = worked > 0 or rows is full
    halves = [_halves(row) for row in rows if len(row.right) > 1]
    control = next((groups[name, budget] for name in CONTROLS[1] if (name, budget) in groups), None)
    return Entry(
        task=task,
        label=label,
        digest=rows[0].digest,
        budget=budget,
        settings=rows[0].settings,
        items=len(rows),
        answers=sum(len(row.right) for row in rows),
        score=interval([(sum(row.right), len(row.right)) for row in rows]) if shown else None,
        early=mean(half[0] for half in halves) if halves and shown else None,
        late=mean(half[1] for half in halves) if halves and shown else None,
        full=against(rows, full) if shown and rows is not full else None,
        p_holm=None,
        control=against(rows, control) if shown and control and rows is not full and label not in controls() else None,
        held=round(mean(row.held for row in rows)),
        bytes=round(mean(row.bytes for row in rows)),
        resident=max(row.resident for row in rows),
        evicted=mean(row.evicted for row in rows),
        new_tokens=mean(row.new_tokens for row in rows),
        worked=worked,
        truncated=sum(row.truncated for row in rows),
        looped=sum(row.looped for row in rows),
    )


def _halves(row: Row) -> tuple[float, float]:
    middle = len(row.right) // 2
    return mean(row.right[:middle]), mean(row.right[middle:])


def against(rows: Sequence[Row], others: Sequence[Row]) -> Paired | None:
    theirs = {(row.seed, row.size, row.number): row.share for row in others}
    both = [(row.share, theirs[key]) for row in rows if (key := (row.seed, row.size, row.number)) in theirs]
    return paired([pair[0] for pair in both], [pair[1] for pair in both]) if both else None


def chance(task: Task, rows: Sequence[Row]) -> float:
    """The share right when each output is graded against the answers of the next item: what guessing gives."""
    count = max(row.number for row in rows) + 2
    items = {(seed, size): task.make(count, seed, size) for seed, size in {(row.seed, row.size) for row in rows}}
    marks: list[bool] = []
    for row in rows:
        marks += task.grade(items[row.seed, row.size][row.number + 1], row.output, cut=row.cut)
    return mean(marks)


def controls() -> set[str]:
    return {name for names in CONTROLS for name in names}
