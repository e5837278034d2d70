"""`kvpolicy compare --suite NAME [MODEL]`: the figures of a paper measured again, on a model that is given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.cli.arguments import is_model
from kvpolicy.errors import UsageError
from kvpolicy.models.processes import processes

if TYPE_CHECKING:
    from kvpolicy.lab.compare.running import Options
    from kvpolicy.lab.suites.running import Outcome
    from kvpolicy.lab.tasks.base import Task

FIRST_CHOICE = ("chain", "questions", "phrase")
"""The task that runs where none is named: the first with several answers an item that the model has words for."""

INDEX = "index.html"


@dataclass(frozen=True)
class Asked:
    """What `compare --suite` was asked for. folder: where rows, pictures and a page go; None: nowhere."""

    suite: str
    model: str
    task: str | None
    budgets: Sequence[int] | None
    only: Sequence[str] | None
    folder: Path | None
    html: Path | None
    json: bool


def model_of(words: Sequence[str], default: str) -> str:
    """The one word that may stand beside --suite. Raises UsageError."""
    if len(words) > 1 or not all(map(is_model, words)):
        raise UsageError(
            f"--suite brings its own policies: give a model alone, not {' '.join(words)} (a hub id has a slash in it)"
        )
    return words[0] if words else default


def refuse(flags: Mapping[str, object], suite: bool) -> None:
    """Raises UsageError where a flag was given that has no meaning with a suite, or none without one."""
    for flag, value in flags.items():
        if value:
            what = "keeps everything in the folder of --output" if suite else "is for --suite"
            raise UsageError(f"{'--suite' if suite else flag} {what}; drop {flag}")


def run_suite(asked: Asked, options: Options, load: Callable[[], tuple[Any, Any]], progress: Any) -> None:
    """Run it, and show what came of it. ``load`` brings model and tokenizer; ``progress`` is the bar's context."""
    from kvpolicy.lab.suites.running import chosen, run, suite_named

    suite = suite_named(asked.suite)
    chosen(suite, asked.only)  # refuses before anything is loaded
    if processes().count > 1:
        raise UsageError("a suite times steps and runs in one process; start it without a launcher")
    if asked.folder is not None and asked.folder.exists() and not asked.folder.is_dir():
        raise UsageError(f"{asked.folder} is no folder; give one with --output")
    if asked.html is not None and not asked.html.absolute().parent.is_dir():
        raise UsageError(f"cannot write {asked.html}: there is no folder {asked.html.absolute().parent}")
    from kvpolicy.lab.suites.base import Lab

    model, tokenizer = load()
    lab = Lab.of(
        model, tokenizer, asked.model, _task(asked.task, model, tokenizer, asked.model, options), options, asked.budgets
    )
    command = f"kvpolicy {' '.join(sys.argv[1:])}"
    with TemporaryDirectory() as nowhere, progress() as tell:
        found = run(suite, lab, asked.folder or Path(nowhere), only=asked.only, tell=tell, command=command)
    _show(found, asked)


def _task(name: str | None, model: Any, tokenizer: Any, called: str, options: Options) -> Task:
    """The task that was named, or the first that the model can read."""
    from kvpolicy.lab.compare.running import Run
    from kvpolicy.lab.tasks.registry import task_named, tasks

    if name is not None:
        return task_named(name)
    run = Run(model, tokenizer, called, options)
    known = [task_named(each) for each in FIRST_CHOICE if each in tasks()]
    return next((task for task in known if run.reads(task)), known[-1])


def _show(found: Outcome, asked: Asked) -> None:
    if asked.json:
        output.json_object(found.to_dict())
    else:
        _print(found)
    from kvpolicy.lab.suites.page import page, pictures

    if asked.folder is not None:
        if find_spec("matplotlib") is None:
            output.note("no pictures: they need matplotlib; `pip install 'kvpolicy[plot]'` brings it")
        else:
            for name, data in pictures(found).items():
                output.write_bytes(asked.folder / f"{name}.png", data)
        output.write_file(asked.folder / INDEX, page(found))
        output.note(f"wrote {escape(str(asked.folder / INDEX))}, and rows and pictures beside it")
    if asked.html is not None:
        output.write_file(asked.html, page(found))
        output.note(f"wrote {escape(str(asked.html))}")


def _print(found: Outcome) -> None:
    """Tables, what was found, and what stands in its way, experiment by experiment."""
    from kvpolicy.lab.suites.page import origin

    output.data(escape(origin(found.about)))
    for experiment in found.suite.experiments:
        told = found.found.get(experiment.name)
        refused = found.refused.get(experiment.name, ())
        if told is None and not refused:
            continue
        output.data("")
        output.data(f"[bold]{escape(experiment.title)}[/] (in the paper: {escape(experiment.paper)})")
        for table in told.tables if told else ():
            output.table(table.columns, [[escape(cell) for cell in row] for row in table.rows], title=table.title)
        sentences = [*map(str, told.findings), *told.doubts] if told else []
        for sentence in (*sentences, *(f"Not run: {each}" for each in refused)):
            output.data(f"  {escape(sentence)}")
