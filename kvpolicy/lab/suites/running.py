"""Runs a suite into a folder, and reads back what a folder holds."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.environment import environment
from kvpolicy.lab.suites.base import Experiment, Found, Lab, Suite, Tell, read_rows
from kvpolicy.language.vocabulary import nearest

SUITES = ("evidence", "raas", "scope")
"""Modules of this package with a ``SUITE``."""

ABOUT = "about.json"

SAME = ("suite", "model", "dtype", "task", "size", "seed", "limit")
"""What must not change from one run into a folder to the next."""


@dataclass
class Outcome:
    """What a folder says of a suite, by experiment; ``about``: how it was made, and what could not run."""

    suite: Suite
    about: dict[str, Any]
    found: dict[str, Found] = field(default_factory=dict)

    @property
    def refused(self) -> Mapping[str, Sequence[str]]:
        told: Mapping[str, Sequence[str]] = self.about.get("refused", {})
        return told

    def to_dict(self) -> dict[str, Any]:
        """For --json: how it was made, and of each experiment its tables, findings and doubts."""
        return {
            "suite": self.suite.name,
            "about": self.about,
            "experiments": [self._told(each) for each in self.suite.experiments if each.name in self.found],
        }

    def _told(self, experiment: Experiment) -> dict[str, Any]:
        found = self.found[experiment.name]
        return {
            "name": experiment.name,
            "title": experiment.title,
            "paper": experiment.paper,
            "tables": [{"title": t.title, "columns": list(t.columns), "rows": [list(r) for r in t.rows]}
                       for t in found.tables],
            "findings": [{"says": f.says, "word": f.word, "where": f.where} for f in found.findings],
            "doubts": found.doubts,
            "refused": list(self.refused.get(experiment.name, ())),
        }  # fmt: skip


def suite_named(name: str) -> Suite:
    """A suite by its name. Raises UsageError where there is none."""
    if name not in SUITES:
        raise UsageError(f"--suite {name!r}: {nearest(name, SUITES)}")
    found: Suite = import_module(f"kvpolicy.lab.suites.{name}").SUITE
    return found


def chosen(suite: Suite, only: Sequence[str] | None) -> list[Experiment]:
    """The experiments asked for, in the suite's order, with those whose rows they read. Raises UsageError."""
    names = [each.name for each in suite.experiments]
    wanted = list(names if only is None else only)
    for name in wanted:
        if name not in names:
            raise UsageError(f"--only {name!r}: {nearest(name, names)}")
    wanted += [each.same for each in suite.experiments if each.name in wanted and each.same is not None]
    return [each for each in suite.experiments if each.name in wanted]


def run(
    suite: Suite,
    lab: Lab,
    folder: Path,
    *,
    only: Sequence[str] | None,
    tell: Tell,
    command: str,
    beside: Sequence[Path] = (),
) -> Outcome:
    """Fill a folder with what is not in it yet, and say what came out.

    Args:
        only: experiments by name; None: all.
        beside: files of other suites, whose rows may be taken.

    Raises:
        UsageError: the folder holds another run, or cannot be written.
        KvpolicyError: an experiment cannot run at all.
    """
    about = taken_up(folder, suite, lab)
    about |= {"command": command, "items": lab.options.count}
    about["budgets"] = sorted({*about["budgets"], *lab.budgets})
    began, cpu, held = time.perf_counter(), time.process_time(), _held(folder)
    experiments = chosen(suite, only)
    try:
        for experiment in experiments:
            path = file_of(experiment, folder)
            known = [file_of(each, folder) for each in suite.experiments if each is not experiment and not each.same]
            known += beside
            refused = experiment.measure(lab, path, [each for each in known if _like_compare(each)], tell)
            if refused or experiment.same is None:
                about["refused"][experiment.name] = refused
    finally:  # what a run that is cut short has measured stays, and may be gone on with elsewhere
        about["seconds"] = round(about["seconds"] + time.perf_counter() - began, 1)
        about["cpu_seconds"] = round(about["cpu_seconds"] + time.process_time() - cpu, 1)
        if _held(folder) != held:
            about["machines"] = _joined(about["machines"], machine(lab))
        _write(folder / ABOUT, about)
    return outcome(suite, folder)


def _held(folder: Path) -> int:
    """Bytes of rows."""
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))


def _joined(machines: Sequence[dict[str, Any]], this: dict[str, Any]) -> list[dict[str, Any]]:
    """All machines that rows were made on, each with the date of its last ones."""
    return [*(each for each in machines if each | {"date": this["date"]} != this), this]


def _like_compare(path: Path) -> bool:
    """Whether a file holds rows of compare."""
    if not path.exists():
        return False
    with path.open(encoding="utf-8") as file:
        return "kvpolicy_row" in file.readline()


def file_of(experiment: Experiment, folder: Path) -> Path:
    """Where its rows are: those of another experiment, if it has none of its own."""
    return folder / f"{experiment.same or experiment.name}.jsonl"


def outcome(suite: Suite, folder: Path) -> Outcome:
    """What a folder's rows say; experiments without rows are left out.

    Raises:
        UsageError: it holds no run of this suite, or something else.
    """
    told = Outcome(suite, about_of(folder))
    for experiment in suite.experiments:
        if rows := read_rows(file_of(experiment, folder)):
            told.found[experiment.name] = experiment.tell(rows)
    if not told.found:
        raise UsageError(f"{folder} holds no rows of the suite {suite.name}: nothing of it could run")
    return told


def about_of(folder: Path) -> dict[str, Any]:
    """How a folder was filled. Raises UsageError."""
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and "suite" in found:
        return found
    raise UsageError(f"{folder} holds no run of a suite; make one with kvpolicy compare --suite")


def taken_up(folder: Path, suite: Suite, lab: Lab) -> dict[str, Any]:
    """What the folder was filled with so far, or the beginning of it. Raises UsageError where it is another run."""
    options = lab.options
    now: dict[str, Any] = {
        "kvpolicy_suite": 1, "suite": suite.name, "model": lab.name,
        "dtype": str(lab.model.dtype).removeprefix("torch."), "task": lab.task.name,
        "size": lab.task.size if options.size is None else options.size, "seed": options.seed, "limit": lab.new,
        "prompt": lab.prompt, "page_size": lab.page, "device": str(lab.model.device),
        "machines": [], "budgets": [], "seconds": 0.0, "cpu_seconds": 0.0, "refused": {},
    }  # fmt: skip
    if not (folder / ABOUT).exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from None
        _write(folder / ABOUT, now)
        return now
    before = about_of(folder)
    for name in SAME:
        if before.get(name) != now[name]:
            raise UsageError(
                f"{folder} holds another run: its {name} is {before.get(name)}, and now {now[name]}; give another "
                "folder with --output"
            )
    kept = ("machines", "budgets", "seconds", "cpu_seconds", "refused")
    return now | {name: before[name] for name in kept}


def machine(lab: Lab) -> dict[str, Any]:
    """What the numbers were made on, without what names one computer among others."""
    told = environment(lab.model.device)
    told.pop("platform")
    return told


def _write(path: Path, told: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
