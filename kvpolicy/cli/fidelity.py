"""`kvpolicy compare --tasks fidelity --dataset FILE`: policies led through given texts, beside the full cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.errors import UsageError
from kvpolicy.models.processes import processes

if TYPE_CHECKING:
    from kvpolicy.lab.compare.arms import Arm
    from kvpolicy.lab.dataset import Text
    from kvpolicy.lab.fidelity.measuring import Fidelity, Options

NAME = "fidelity"


@dataclass(frozen=True)
class Asked:
    """What `compare` was asked for. rows, csv, html, png: files to write."""

    arms: Sequence[Arm]
    texts: Sequence[Text]
    options: Options
    rows: Path | None
    csv: Path | None
    html: Path | None
    png: Path | None
    json: bool


def texts_of(tasks: str | None, dataset: Path | None, split: float | None, most: int | None) -> list[Text] | None:
    """The texts to be led through; None where another task was asked for.

    Raises:
        UsageError: the task and the file do not go together, or the file makes no sense.
    """
    names = [] if tasks is None else [name.strip() for name in tasks.split(",")]
    if NAME not in names:
        if dataset is not None or split is not None:
            flag = "--split" if dataset is None else "--dataset"
            raise UsageError(f"{flag} is for the task {NAME}; add --tasks {NAME}")
        return None
    if len(names) > 1:
        raise UsageError(f"the task {NAME} scores no answers and has a table of its own; run the other tasks apart")
    if dataset is None:
        raise UsageError(f"the task {NAME} needs texts: --dataset FILE, .jsonl with prompt and output, or .txt")
    from kvpolicy.lab.dataset import HALF, need_outputs, read_dataset

    texts = read_dataset(dataset, most=most, split=HALF if split is None else split)
    need_outputs(texts)
    return texts


def lead_through(model: Any, tokenizer: Any, name: str, asked: Asked, tell: Callable[[int, int, str], None]) -> None:
    """Run it, and show what came of it."""
    from kvpolicy.lab.fidelity.measuring import Fidelity

    run = Fidelity(model, tokenizer, name, asked.options, asked.rows, tell)
    run.run(asked.arms, asked.texts)
    if processes().first:
        _finish(run, asked)


def _finish(run: Fidelity, asked: Asked) -> None:
    from kvpolicy.lab.fidelity.report import COLUMNS, as_csv, doubts, entries, table

    found = entries(run.rows)
    warnings = list(doubts(found))
    refused = [
        {"label": label, "budget": budget, "reason": reason} for (_, label, budget), reason in run.refused.items()
    ]
    if run.taken_up:
        output.note(f"{run.taken_up} of {len(run.rows)} results were in {escape(str(asked.rows))} already")
    if asked.json:
        told = [entry.to_dict() for entry in found]
        said = {"model": run.name, "way": run.way, "entries": told, "verdicts": warnings, "refused": refused}
        output.json_object(said | {"command": _command()})
    else:
        title = f"{run.name}: against the full cache on the same texts (in brackets: 95 % intervals)"
        output.table(COLUMNS, [[escape(cell) for cell in line] for line in table(found)], title=title)
        for warning in warnings:
            output.data(escape(warning))
        for sentence in run.refusals():
            output.data(escape(sentence))
    if asked.csv is not None:
        output.write_file(asked.csv, as_csv(found))
        output.note(f"wrote {escape(str(asked.csv))}")
    if asked.html is not None:
        from kvpolicy.lab.fidelity.page import page

        output.write_file(asked.html, page(run.name, found, list(run.refusals()), _command()))
        output.note(f"wrote {escape(str(asked.html))}")
    if asked.png is not None:
        from kvpolicy.lab.fidelity.picture import picture

        output.write_bytes(asked.png, picture(run.name, found))
        output.note(f"wrote {escape(str(asked.png))}")


def _command() -> str:
    return f"kvpolicy {' '.join(sys.argv[1:])}"


def arm_alone(tell: Callable[[int, int, str], None]) -> Callable[[int, int, str], None]:
    """For where no bar is drawn: of what is told, the arm, without how far it is."""
    return lambda done, total, what: tell(done, total, what.partition(":")[0])
