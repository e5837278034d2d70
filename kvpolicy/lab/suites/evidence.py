"""All policies on one task at the same budgets, and checks of the evaluator itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kvpolicy.lab.bench.tables import Table
from kvpolicy.lab.compare.arms import FULL, Arm
from kvpolicy.lab.compare.report import Report
from kvpolicy.lab.compare.rows import Row
from kvpolicy.lab.compare.running import Run
from kvpolicy.lab.compare.statistics import interval
from kvpolicy.lab.compare.tables import percent, refusals
from kvpolicy.lab.suites.accuracy import BUDGETS, Accuracy, Axis, Claim, Marks, difference, scored
from kvpolicy.lab.suites.arms import arm, fitted, full, policy_named, quest
from kvpolicy.lab.suites.base import Experiment, Found, Lab, Rows, Suite, Tell
from kvpolicy.lab.suites.claims import Finding, Kind, Word
from kvpolicy.lab.suites.places import ByPlace
from kvpolicy.lab.tasks.base import Task
from kvpolicy.lab.tasks.registry import task_named

POLICIES = (
    *("raas", "quest", "quest-raas", "raas-compressed-prompt", "h2o", "streaming-llm", "tova", "snapkv"),
    *("scope-slide", "scope-adaptive", "scope-discontinuous", "r-kv", "random", "random-unpinned", "window"),
)

SIZES = ("budget", "heavy", "recent", "window", "alpha", "beta1", "beta2")
"""Params that say how many tokens stay."""

ABLE = 0.95
"""The full cache must be right so often before the small model says anything of a claim."""


def everywhere(lab: Lab) -> Sequence[Arm]:
    """Every policy at every budget."""
    return [
        full(),
        *(
            arm(lab, quest(lab) if name == "quest" else name, budget, name)
            for name in POLICIES
            for budget in lab.budgets
        ),
    ]


def boundless(lab: Lab) -> Sequence[Arm]:
    """Every policy with more room than the text needs."""
    room = lab.prompt + lab.new + 64
    arms = [full()]
    for name in POLICIES:
        shipped = quest(lab) if name == "quest" else name
        policy = policy_named(shipped)
        own = fitted(lab, policy)
        arms.append(arm(lab, shipped, None, name, **{size: room for size in SIZES if size in policy.params} | own))
    return arms


@dataclass(frozen=True)
class Metamorphic(Experiment):
    """What must hold whatever policies are worth: with room for everything each is the full cache, and the labels of
    other items give chance."""

    name: str = "evidence-evaluator"
    title: str = "The evaluator itself: room for everything, and other items' labels"
    paper: str = "none; most published tables lack such checks"
    same: str | None = None

    def measure(self, lab: Lab, path: Path, known: Sequence[Path], tell: Tell) -> list[str]:
        run = Run(lab.model, lab.tokenizer, lab.name, lab.options, path, tell)
        run.run(boundless(lab), [lab.task])
        return list(refusals(Report(lab.name, refused=run.refused)))

    def tell(self, rows: Rows) -> Found:
        own = scored(rows)
        found = [row for row in own if row.label == FULL]
        findings = [*_like_the_full_cache(own, found), shuffled(task_named(own[0].task), found)]
        return Found([_table(own, found)], findings=findings)


def _like_the_full_cache(rows: Sequence[Row], found: Sequence[Row]) -> Iterator[Finding]:
    different = [
        label for label, of in _by_label(rows).items() if label != FULL and not all(_alike(of, found).values())
    ]
    count = len(_by_label(rows)) - 1
    yield Finding(
        "a budget above the length gives exactly the full cache's outputs and marks",
        Word.FAILS if different else Word.HOLDS,
        f"Of {count} policies on {len(found)} items each, "
        + (f"other outputs came from {', '.join(different)}." if different else "all wrote the very same."),
    )


def _alike(rows: Sequence[Row], found: Sequence[Row]) -> dict[int, bool]:
    """By item, whether output and marks are the full cache's."""
    theirs = {row.number: (row.output, row.right) for row in found}
    return {row.number: theirs.get(row.number) == (row.output, row.right) for row in rows}


def _by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.label, []).append(row)
    return found


def _table(rows: Sequence[Row], found: Sequence[Row]) -> Table:
    lines = []
    for label, of in _by_label(rows).items():
        right = interval([(sum(row.right), len(row.right)) for row in of])
        same = sum(_alike(of, found).values())
        lines.append([label, percent(right.share), f"{same} of {len(of)}", str(sum(row.evicted for row in of))])
    return Table("With room for everything", ["", "right", "outputs like the full cache's", "evicted"], lines)


def shuffled(task: Task, rows: Sequence[Row]) -> Finding:
    """Whether outputs graded against the next item's answers are right no more often than answers meet by chance: how
    often two answers drawn from all of them are equal."""
    items = task.make(max(row.number for row in rows) + 2, rows[0].seed, rows[0].size)
    marks = [task.grade(items[row.number + 1], row.output, cut=row.cut) for row in rows]
    found = interval([(sum(mark), len(mark)) for mark in marks])
    answers = Counter(answer for item in items for answer in item.answers)
    total = sum(answers.values())
    meet = sum((count / total) ** 2 for count in answers.values())
    return Finding(
        "other items' labels give chance",
        Word.HOLDS if found.low <= meet else Word.FAILS,
        f"Right then: {found.share:.1%} ({found.low:.1%} to {found.high:.1%}); two answers are equal by chance "
        f"{meet:.1%} of the time.",
    )


@dataclass(frozen=True)
class Rising(Experiment):
    """Whether the score rises with the budget, over the rows of ``same``."""

    name: str = "evidence-rising"
    title: str = "The score rises with the budget"
    paper: str = "none"
    same: str | None = "evidence-table"
    axis: Axis = BUDGETS

    def measure(self, lab: Lab, path: Path, known: Sequence[Path], tell: Tell) -> list[str]:
        return []

    def tell(self, rows: Rows) -> Found:
        marks = Marks(scored(rows), self.axis)
        falls: list[str] = []
        for name in marks.names:
            places = [place for place in marks.places if (name, place) in marks.of]
            for less, more in pairwise(places):
                found = difference(marks.of[name, more], marks.of[name, less])
                if found is not None and found.high < 0:
                    falls.append(f"{name} from {self.axis.words(less)} to {self.axis.words(more)}: {found}")
        told = "; ".join(falls) or f"No step of any of {len(marks.names)} policies lies below 0 with its interval"
        says = "the score rises with the budget for every policy, within the interval"
        return Found(findings=[Finding(says, Word.FAILS if falls else Word.HOLDS, f"{told}.")])


def _off(name: str, words: str) -> Claim:
    return Claim(f"{words} falls off where RaaS does not", Kind.BELOW, name, where="raas", able=ABLE)


SUITE = Suite(
    "evidence",
    "Every policy on one task, and checks of the evaluator",
    "",
    (
        Accuracy(
            "evidence-table", "All policies at the same budgets", "RaaS's and SCOPE's main comparisons together",
            everywhere,
            claims=(
                Claim("RaaS stays within 3 points of the full cache at some budget", Kind.NEAR, "raas", every=False,
                      able=ABLE),
                Claim("Quest stays within 3 points of the full cache at some budget", Kind.NEAR, "quest", every=False,
                      able=ABLE),
                _off("h2o", "H2O"),
                _off("streaming-llm", "StreamingLLM"),
                Claim("RaaS is better than dropping at random behind a pinned prompt", Kind.ABOVE, "raas", "random",
                      able=ABLE),
                Claim("SCOPE (slide) is better than dropping at random behind a pinned prompt", Kind.ABOVE,
                      "scope-slide", "random", able=ABLE),
            ),
        ),
        ByPlace("evidence-late", "Right answers by place in the output", "none", "evidence-table", drawn=False),
        Metamorphic(),
        Rising(),
    ),
)  # fmt: skip
