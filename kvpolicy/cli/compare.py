"""`kvpolicy compare`: what policies cost a model in right answers, at several budgets, beside the full cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kvpolicy.cli import fidelity, output
from kvpolicy.cli import suite as suites
from kvpolicy.cli.arguments import Json, Settings, is_model, parse_settings
from kvpolicy.cli.bench import OWN, numbers
from kvpolicy.cli.simulate import distinct
from kvpolicy.cli.texts import with_settings
from kvpolicy.errors import UsageError
from kvpolicy.language import Policy, load_policy
from kvpolicy.models.processes import processes

if TYPE_CHECKING:
    from kvpolicy.lab.compare.report import Report
    from kvpolicy.lab.compare.running import Run
    from kvpolicy.lab.tasks.base import Task

TOGETHER = True

EPILOG = (
    "Examples: kvpolicy compare h2o streaming-llm scope-slide --budgets 32,48,64; kvpolicy compare raas my.yaml "
    "builtin:smollm2 --tasks passkey,needles --budgets 128,256,512 --save rows.jsonl --html report.html. The full "
    "cache, window and random always run beside what is asked for. With --save, the same command goes on where it was "
    "stopped. kvpolicy list tasks names the tasks."
)

DEFAULT_MODEL = "builtin:tiny"
FIRST_CHOICE = ("passkey", "phrase", "chain")
"""The task that runs where none is named: the first that the model has words for."""

BUDGETS = "64,128,256"

Policies = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SPEC… [MODEL]",
        help="Policies: YAML files, names of shipped ones, or - for stdin; then a model, builtin:tiny unless given.",
    ),
]


@dataclass(frozen=True)
class Files:
    """Where things are written."""

    rows: Path | None
    csv: Path | None
    html: Path | None
    png: Path | None


def run(
    specs: Policies = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", metavar="NAME", help="Instead of policies: a paper's figures; raas, scope, evidence."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", "-t", help="Tasks, as in passkey,copy; by default one that the model can read."),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            "--budgets",
            help=f"Tokens that every policy holds, by default {BUDGETS}, or shares of a suite's texts; {OWN}: as its "
            "params say.",
        ),
    ] = None,
    items: Annotated[int, typer.Option("--items", "-k", min=1, help="Prompts of each task.")] = 16,
    size: Annotated[
        int | None, typer.Option("--size", min=1, help="Words of a prompt; by default the task's own.")
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", metavar="FILE", help="Texts for --tasks fidelity: .jsonl with prompt, output; .txt."),
    ] = None,
    cut: Annotated[
        float | None, typer.Option("--split", min=0, max=1, help="Where a .txt is cut, as a share of it; 0.5.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts.")] = 0,
    new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", min=1, help="Of an output; by default enough for the task.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Prompts that are run at once.")] = 16,
    settings: Settings = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Keep every result as a line of JSON, and go on from those there."),
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the table as CSV.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Plot scores against budgets; needs matplotlib.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Of --suite: rows, pictures and a page.")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="NAMES", help="Of --suite: some experiments, as in raas-accuracy.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; by default a GPU.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16; the model's own.")] = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the steps.")] = False,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the model's chat template if any.")] = None,
    generic: Annotated[
        bool, typer.Option("--generic", help="Try a model of a type that kvpolicy does not know, untested.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare policies by right answers: policy × budget × task, against the full cache, with intervals."""

    def loader(model: str) -> tuple[Any, Any]:
        from kvpolicy.models import load_model

        with output.busy(f"loading {model}"):
            return load_model(model, device=device, dtype=dtype, notify=lambda line: output.note(escape(line)))

    if suite is not None:
        from kvpolicy.lab.bench.quiet import quiet_profiler

        quiet_profiler()
        suites.refuse({"--save": save, "--csv": csv, "--png": png, "--dataset": dataset, "--set": settings}, True)
        from kvpolicy.lab.compare.running import Options

        model = suites.model_of(specs or [], DEFAULT_MODEL)
        sizes = None if budgets is None else numbers(budgets, "--budgets")
        parts = None if only is None else [name.strip() for name in only.split(",")]
        wish = suites.Asked(suite, model, tasks, sizes, parts, folder, html, json)
        options = Options(items, seed, size, new_tokens, batch, chat, compile, generic)
        suites.run_suite(wish, options, lambda: loader(model), progress)
        return
    suites.refuse({"--output": folder, "--only": only}, False)
    files = Files(save, csv, html, png)
    _check(files)
    specs, model = split(specs or [])
    budgets = budgets or BUDGETS
    wanted: list[int | None] = [None] if budgets == OWN else [*numbers(budgets, "--budgets")]
    policies = _policies(specs, parse_settings(settings))
    texts = fidelity.texts_of(tasks, dataset, cut, items)
    from kvpolicy.lab.compare.arms import arms
    from kvpolicy.lab.compare.running import Options, Run
    from kvpolicy.lab.tasks.registry import task_named

    words = [] if tasks is None or texts is not None else tasks.split(",")
    named = [task_named(name.strip(), [fidelity.NAME]) for name in dict.fromkeys(words)]
    loaded, tokenizer = loader(model)
    order = sorted(wanted, key=lambda budget: budget or 0)
    if texts is not None:
        from kvpolicy.lab.fidelity.measuring import Options as Led

        how = Led(new_tokens, batch, bool(chat), compile, generic)
        led = fidelity.Asked(arms(policies, order), texts, how, save, csv, html, png, json)
        with progress() as tell, _resumable(save):
            tell = tell if output.stderr().is_terminal else fidelity.arm_alone(tell)
            fidelity.lead_through(loaded, tokenizer, model, led, tell)
        return
    options = Options(items, seed, size, new_tokens, batch, chat, compile, generic)
    started = Run(loaded, tokenizer, model, options, save)
    chosen = named or [_first_choice(started)]
    with progress() as tell, _resumable(save):
        started.tell = tell
        started.run(arms(policies, order), chosen)
    if processes().first:
        finish(started, chosen, files, json)


def finish(run: Run, tasks: Sequence[Task], files: Files, json: bool) -> None:
    """Show what came of a run, and write what was asked for."""
    from kvpolicy.lab.compare.report import report
    from kvpolicy.lab.compare.tables import as_csv, remarks, tables
    from kvpolicy.lab.compare.verdicts import verdicts

    found = report(
        run.rows, {task.name: task for task in tasks}, refused=run.refused, device=str(run.model.device),
        command=f"kvpolicy {' '.join(sys.argv[1:])}",
    )  # fmt: skip
    warnings = list(verdicts(found, run.rows))
    if run.taken_up:
        output.note(f"{run.taken_up} of {len(run.rows)} results were in {escape(str(files.rows))} already")
    if json:
        output.json_object({**found.to_dict(), "verdicts": warnings})
    else:
        for table in tables(found):
            output.table(table.columns, [[escape(cell) for cell in row] for row in table.rows], title=table.title)
            output.data("")
        for line in remarks(found, warnings):
            output.data(escape(line))
    if files.csv is not None:
        output.write_file(files.csv, as_csv(found))
        output.note(f"wrote {escape(str(files.csv))}")
    _draw(found, warnings, files)


def _draw(found: Report, warnings: Sequence[str], files: Files) -> None:
    if files.html is not None:
        from kvpolicy.lab.compare.page import page

        output.write_file(files.html, page(found, warnings))
        output.note(f"wrote {escape(str(files.html))}")
    if files.png is not None:
        from kvpolicy.lab.compare.picture import picture

        output.write_bytes(files.png, picture(found))
        output.note(f"wrote {escape(str(files.png))}")


def split(words: Sequence[str]) -> tuple[list[str], str]:
    """`SPEC… [MODEL]` as policies and a model: the last word is one unless it can be a policy.

    Raises:
        UsageError: there is no policy, or a model stands among them.
    """
    *first, last = words or [DEFAULT_MODEL]
    specs, model = (first, last) if is_model(last) else ([*words], DEFAULT_MODEL)
    for word in specs:
        if word.startswith("builtin:") or word.endswith(".gguf"):
            raise UsageError(f"{word} is a model: give one, after all policies")
    if not specs:
        raise UsageError(
            f"no policy was given to run on {model}; name one before it, as in kvpolicy compare h2o {model}"
        )
    return specs, model


def _policies(specs: Sequence[str], given: dict[str, str]) -> list[tuple[str, Policy, dict[str, str]]]:
    """(what it is called, the policy, the params set that it has)."""
    policies = [load_policy(spec) for spec in specs]
    with_settings(policies, given, {})  # refuses what fits none of them, before a model is loaded
    labels = distinct(specs, [policy.name for policy in policies])
    return [
        (label, policy, {name: value for name, value in given.items() if name in policy.params})
        for label, policy in zip(labels, policies, strict=True)
    ]


def _first_choice(started: Run) -> Task:
    from kvpolicy.lab.tasks.registry import task_named

    return next(task for task in map(task_named, FIRST_CHOICE) if task.name == FIRST_CHOICE[-1] or started.reads(task))


@contextmanager
def _resumable(path: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if path is not None:
            output.note(f"\nstopped; what was done is in {escape(str(path))}, and the same command goes on from there")
        raise


@contextmanager
def progress() -> Iterator[Any]:
    """How far it is, on stderr: a bar on a terminal, else a line whenever another arm begins; yields what to tell."""
    console = output.stderr()
    if output.is_quiet():
        yield lambda done, total, what: None
    elif console.is_terminal:
        from rich.progress import Progress

        with Progress(console=console, transient=True) as bar:
            line = bar.add_task("")
            yield lambda done, total, what: bar.update(line, completed=done, total=total, description=escape(what))
    else:
        said: list[str] = []

        def tell(done: int, total: int, what: str) -> None:
            if done < total and said[-1:] != [what]:
                said.append(what)
                output.note(escape(f"{what} ({done} of {total})"))

        yield tell


def _check(files: Files) -> None:
    """Refuse before the long part what could not be written after it."""
    if files.png is not None:
        from kvpolicy.lab.chart import require_matplotlib

        require_matplotlib("--png")
    for path in (files.rows, files.csv, files.html, files.png):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {path.absolute().parent}")
