"""What was asked of a GPU, and what one showed: a line for each target."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Outcome:
    """One target.

    ideal: what bytes alone would give, at the sizes that were run. must: the least that is asked; None: it is only
    printed. measured: None where it was not, and ``note`` says why.
    """

    test: str
    ideal: float | None
    must: float | None
    measured: float | None = None
    unit: str = "×"
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.must is None or self.measured is None:
            return None
        return self.measured >= self.must

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}

    def cells(self) -> list[str]:
        """As a row of a table: test, ideal, must reach, measured, whether met, note."""
        numbers = [_number(value, self.unit) for value in (self.ideal, self.must, self.measured)]
        return [self.test, *numbers, {None: "–", True: "yes", False: "NO"}[self.met], self.note]


COLUMNS = ("test", "ideal", "must reach", "measured", "met", "note")


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}×" if unit == "×" else f"{value:,.0f} {unit}"
