"""What every run of arms does: it takes rows up again, refuses arms that cannot run, and keeps rows as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.lab.compare.arms import Arm, Bound, bound
from kvpolicy.lab.compare.rows import Row, append, read
from kvpolicy.lab.running import plan_for
from kvpolicy.models.processes import processes
from kvpolicy.plan import ModelGeometry


class Cell(Protocol):
    """What runs at once under one arm."""

    @property
    def name(self) -> str:
        """What it is called while it runs."""


C = TypeVar("C", bound=Cell)


@dataclass
class Keeping:
    """A model and what is asked of it; ``rows`` grow, and ``refused`` names arms that cannot run, with the reason.

    name: what the model is called in rows. path: where rows are kept, and from where they are taken up again.
    tell: hears cells done, of how many, and what runs now. known: rows of other runs that count as well; those that
    this one would make are copied into its file.
    """

    model: Any
    tokenizer: Any
    name: str
    options: Any
    path: Path | None = None
    tell: Callable[[int, int, str], None] = lambda done, total, what: None
    known: Sequence[Row] = ()
    rows: list[Row] = field(default_factory=list)
    refused: dict[tuple[str, str, int | None], str] = field(default_factory=dict)
    taken_up: int = 0
    _at: tuple[int, int] = (0, 0)
    _own: set[tuple[Any, ...]] = field(default_factory=set)

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def geometry(self) -> ModelGeometry:
        return ModelGeometry.from_config(self.model.config, self.dtype)

    def find_known(self) -> dict[tuple[Any, ...], Row]:
        """The rows that need not be made again, by key.

        Raises:
            UsageError: the file cannot be read, or is none of rows.
        """
        own = processes().told(lambda: {row.key: row for row in read(self.path)} if self.path else {})
        self._own = set(own)
        return {row.key: row for row in self.known} | own

    def arms_that_run(self, task: str, arms: Sequence[Arm], prompt: tuple[int, int], limit: int) -> Iterator[Bound]:
        """Arms that can run on prompts of (fewest, most) tokens, their params found for the longest; of two that come
        to the same, the first.

        Raises:
            ModelError: a text would be longer than the model's.
        """
        plan_for(self.model, arms[0].policy, prompt[1], limit)  # refuses what is too long for the model itself
        seen: set[tuple[str, int | None]] = set()
        for arm in arms:
            try:
                found = bound(arm, self.geometry, prompt=prompt[1], max_new_tokens=limit)
                plan_for(self.model, found.policy, prompt[0], limit)
            except (UsageError, PolicyError) as refusal:
                self.refused[task, arm.label, arm.budget] = str(refusal).splitlines()[0]
                continue
            if (key := (found.policy.digest, arm.budget)) not in seen:
                seen.add(key)
                yield found

    def make(self, cells: Sequence[C], work: Callable[[C], list[Row]]) -> None:
        """Make the rows of these cells, after those that were known and stand in ``rows`` already."""
        here = processes()
        self.taken_up = len(self.rows)
        self._keep([row for row in self.rows if row.key not in self._own])
        for start in range(0, len(cells), here.count):
            now = cells[start : start + here.count]
            self._at = (start, len(cells))
            self.note(now[0].name)
            new = [row for rows in here.spread(now, work) for row in rows]
            self.rows += new
            self._keep(new)
        self.tell(len(cells), len(cells), "done")

    def refusals(self) -> Iterator[str]:
        """A sentence for each arm that could not run."""
        for (_, label, budget), reason in self.refused.items():
            yield f"{label}{'' if budget is None else f' at {budget:,}'} cannot run: {reason}"

    def note(self, what: str) -> None:
        """Tell what runs now."""
        self.tell(*self._at, what)

    def _keep(self, rows: Sequence[Row]) -> None:
        if self.path is not None and processes().first and rows:
            append(self.path, rows)
