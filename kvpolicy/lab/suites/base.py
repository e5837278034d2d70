"""What a suite is: experiments, each of which leaves rows, and tells from its rows alone what came out.

Rows are lines of JSON in a file of the experiment's name, so that a suite goes on where it was stopped, and its tables
and pictures can be made again without a model.
"""

from __future__ import annotations

import json
import lzma
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.tables import Table
from kvpolicy.lab.compare.running import Options, Run
from kvpolicy.lab.panels import Panel
from kvpolicy.lab.suites.claims import Finding
from kvpolicy.lab.tasks.base import Task
from kvpolicy.plan import ModelGeometry

Rows = Sequence[Mapping[str, Any]]
Tell = Callable[[int, int, str], None]

SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Budgets, of the longest text, where none are given."""

PAGE, SMALL_PAGE = 16, 4
"""Tokens of a page: as published, and where the smallest budget would be four pages or less."""


@dataclass(frozen=True)
class Heat:
    """Where kept tokens stand, by step: for each of some moments, from the first to the last, and for each stretch of
    the text, the share of its tokens that is held (``cells``, 0 to 1; None where nothing has been said yet).

    prompt: where the prompt ends, as a share of the text.
    """

    title: str
    cells: Sequence[Sequence[float | None]]
    steps: int
    prompt: float


@dataclass
class Found:
    """What rows say. ``doubts``: what to know before it is believed; ``grid``: the scores alone, series by places;
    ``upright``: what the panels' values are."""

    tables: list[Table] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    heats: list[Heat] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    grid: Table | None = None
    upright: str = "right answers"


@dataclass
class Lab:
    """A model, a task, and lengths that all experiments share.

    prompt, new: tokens of the longest prompt, and new ones at the most. budgets: tokens, from the smallest.
    """

    model: Any
    tokenizer: Any
    name: str
    task: Task
    options: Options
    budgets: tuple[int, ...]
    prompt: int
    new: int

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, name: str, task: Task, options: Options, budgets: Sequence[int] | None = None
    ) -> Lab:
        """With budgets that are shares of the text, in whole pages, unless they are given."""
        prompt, new = Run(model, tokenizer, name, options).lengths(task)
        text = prompt + new
        page = PAGE if text * SHARES[0] >= 4 * PAGE else SMALL_PAGE
        chosen = budgets or [max(page, round(text * share / page) * page) for share in SHARES]
        return cls(model, tokenizer, name, task, options, tuple(sorted(set(chosen))), prompt, new)

    @property
    def geometry(self) -> ModelGeometry:
        return ModelGeometry.from_config(self.model.config, str(self.model.dtype).removeprefix("torch."))

    @property
    def page(self) -> int:
        """Tokens of a page for policies that have pages."""
        return PAGE if self.budgets[0] >= 4 * PAGE else SMALL_PAGE


class Experiment(ABC):
    """One question.

    Attributes:
        name: of its files. title: what it shows. paper: which figure or table, or what part of the paper it belongs to.
        same: an experiment whose rows it reads, having none of its own.
    """

    name: str
    title: str
    paper: str
    same: str | None = None

    @abstractmethod
    def measure(self, lab: Lab, path: Path, known: Sequence[Path], tell: Tell) -> list[str]:
        """Fill the file with rows that are not in it yet.

        Args:
            known: files of other experiments, whose rows may be taken.

        Returns: a sentence for whatever cannot run, with the reason.

        Raises:
            KvpolicyError: nothing of it can run.
        """

    @abstractmethod
    def tell(self, rows: Rows) -> Found:
        """What rows say; equal rows say the same.

        Raises:
            UsageError: they say nothing.
        """


@dataclass(frozen=True)
class Suite:
    """``experiments`` in reading order; ``paper``: whose they are, as arXiv numbers it."""

    name: str
    title: str
    paper: str
    experiments: tuple[Experiment, ...]

    def experiment(self, name: str) -> Experiment:
        return next(each for each in self.experiments if each.name == name)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, or of its packed form; none where there is neither. A last line without an end is left out.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    packed = packed_name(path)
    if not path.exists() and not packed.exists():
        return []
    try:
        text = path.read_bytes() if path.exists() else lzma.decompress(packed.read_bytes())
        rows = [json.loads(line) for line in text.decode().split("\n")[:-1]]
    except (OSError, ValueError, lzma.LZMAError):
        raise UsageError(f"{path} holds no rows of a suite; give another folder, or remove it") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path} holds no rows of a suite; give another folder, or remove it")
    return rows


def packed_name(path: Path) -> Path:
    """Where the rows of a file lie once they are packed."""
    return path.with_name(f"{path.name}.xz")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row. Raises UsageError."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; give a folder that can be written to") from None
