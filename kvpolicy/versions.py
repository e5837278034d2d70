"""Which versions of transformers and torch this was tested on, and whether those that are installed are among them.

What is known lies in `matrix.json` beside the architectures, written by `make matrix`. Imports neither of the two.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

PACKAGES = ("transformers", "torch")

Release = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """One run of the tests that decide, on one pair of versions.

    passed: whether every test did; failed: those that did not; families: model types all of whose tests passed there.
    """

    transformers: str
    torch: str
    python: str
    date: str
    passed: bool
    failed: tuple[str, ...] = ()
    families: tuple[str, ...] = ()


@cache
def runs() -> tuple[Run, ...]:
    """Every run on record, the oldest versions first; none where nothing was recorded."""
    record = files("kvpolicy.patches") / "matrix.json"
    if not record.is_file():
        return ()
    told = json.loads(record.read_text(encoding="utf-8"))["runs"]
    return tuple(Run(**{**run, "failed": tuple(run["failed"]), "families": tuple(run["families"])}) for run in told)


def release(text: str) -> Release:
    """The numbers of a version, for comparing: "2.13.0+cpu" -> (2, 13, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()


def tested(package: str, family: str | None = None) -> list[str]:
    """Versions of a package on which everything passed (of a model type: all of its tests), the oldest first."""
    found = {getattr(run, package) for run in runs() if (run.passed if family is None else family in run.families)}
    return sorted(found, key=release)


def untested() -> Iterator[str]:
    """One sentence for each installed package that is outside the tested range; releases of one minor count alike."""
    for package in PACKAGES:
        known = tested(package)
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        minors = [release(each)[:2] for each in known]
        now = release(installed)[:2]
        broken = [run for run in runs() if release(getattr(run, package))[:2] == now and not run.passed]
        if minors and (not minors[0] <= now <= minors[-1] or (now not in minors and broken)):
            yield f"{package} {installed} is installed, and tests passed on {known[0]} to {known[-1]}"


@cache
def warn_untested() -> None:
    """Warn where an installed version is outside the tested range, once in a process."""
    for sentence in untested():
        warnings.warn(
            f"{sentence}; results may be wrong without an error. Install a tested version, or compare with the "
            "unpatched model at a budget above the length first",
            stacklevel=3,
        )
