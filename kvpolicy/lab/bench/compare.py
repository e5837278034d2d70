"""Two reports beside one another: the ratios within each run, never milliseconds, which belong to a machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpolicy.errors import UsageError

FORMAT = 1
"""Of saved reports."""


@dataclass(frozen=True)
class Change:
    """One ratio, before and now. ``change``: by what part it grew; ``worse``: whether it fell by more than allowed."""

    what: str
    before: float
    now: float
    worse: bool

    @property
    def change(self) -> float:
        return self.now / self.before - 1


@dataclass(frozen=True)
class Comparison:
    """What two reports have in common, and by name what only one of them has."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_now: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.worse]


def save(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report. Raises UsageError."""
    try:
        path.write_text(
            json.dumps({"kvpolicy_bench": FORMAT, **report}, indent=2, default=str) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; give a path in a folder that exists") from None


def load(path: Path) -> dict[str, Any]:
    """Read a saved report.

    Raises:
        UsageError: there is none, or it is something else.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give a file that bench --save wrote") from None
    except ValueError:
        raise UsageError(f"{path} is no JSON; give a file that bench --save wrote") from None
    if not isinstance(told, dict) or told.get("kvpolicy_bench") != FORMAT:
        raise UsageError(f"{path} is no report of kvpolicy bench in format {FORMAT}; write one with --save")
    return told


def compare(before: Mapping[str, Any], now: Mapping[str, Any], max_regress: float) -> Comparison:
    """Hold a report against an earlier one.

    Args:
        max_regress: by what part a ratio may fall, as in 0.05.
    """
    old, new = dict(ratios(before)), dict(ratios(now))
    changes = tuple(
        Change(what, old[what], new[what], new[what] < old[what] * (1 - max_regress)) for what in new if what in old
    )
    notes = tuple(
        f"{key}: {before.get(key)} then, {now.get(key)} now"
        for key in ("model", "device")
        if before.get(key) != now.get(key)
    )
    return Comparison(
        changes,
        tuple(what for what in old if what not in new),
        tuple(what for what in new if what not in old),
        notes,
    )


def ratios(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every ratio of a report under a name, the larger the better."""
    for row in report.get("rows", ()):
        budget = "" if row["budget"] is None else f", budget {row['budget']}"
        arm = row["label"] if row["arm"] in ("policy", row["label"]) else row["arm"]
        for reference, ratio in row["ratios"].items():
            yield f"{arm}{budget}, context {row['context']}, batch {row['batch']}, against {reference}", ratio
    for row in report.get("capacities", ()):
        if row["tokens_per_second"] is not None and row["times_dense"] is not None:
            yield (
                f"{row['label']}, budget {row['budget']}, context {row['context']}, in equal memory",
                row["times_dense"],
            )
    for row in report.get("growths", ()):
        early, late = row["seen"]
        yield f"{row['label']}, budget {row['budget']}, after {early} against after {late}", 1 / row["ratio"]
