"""`kvpolicy bench`: what a step costs under policies, against full caches, measured in one run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.cli.arguments import Json, Settings, Specs, parse_settings
from kvpolicy.cli.explain import tokens
from kvpolicy.cli.simulate import distinct
from kvpolicy.cli.texts import with_settings
from kvpolicy.errors import KvpolicyError, UsageError
from kvpolicy.language import load_policy
from kvpolicy.language.vocabulary import nearest
from kvpolicy.models.processes import processes
from kvpolicy.models.shapes import SHAPES, config_named

if TYPE_CHECKING:
    from kvpolicy.lab.bench.compare import Comparison
    from kvpolicy.lab.bench.measuring import Bench
    from kvpolicy.lab.bench.rows import Report

DEFAULT_SHAPE = "smollm2-135m"
OWN = "own"
AGAINST = ("dense", "dense-at-budget", "hf-dynamic", "hf-dynamic-at-budget", "hf-static", "hf-flex")

TOGETHER = True

EPILOG = (
    "Examples: kvpolicy bench h2o raas --budget 1k --context 4k; kvpolicy bench scope-slide -m builtin:tiny --context "
    "512 --budget 128 --against dense,hf-dynamic; kvpolicy bench raas --shape llama-3.1-8b --context 32k --budget 2k "
    "--batch 1,8 --prompt 1k; kvpolicy bench window --layers 2 --compare before.json. Exit codes: 1 a ratio fell by "
    "more than --max-regress, 2 also for a policy that evicted nothing."
)


@dataclass(frozen=True)
class Files:
    """What is read and written besides the tables."""

    save: Path | None
    compare: Path | None
    plot: Path | None
    max_regress: float


@dataclass
class Extra:
    """What is measured besides rows of equal batch."""

    memory: int | None
    throughput: bool
    seen: tuple[int, int] | None
    notes: list[str] = field(default_factory=list)


def run(
    specs: Specs,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A real model: builtin:…, a folder, a hub id, a .gguf file.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", help=f"Random weights in a shape: {', '.join(SHAPES)}; by default {DEFAULT_SHAPE}."),
    ] = None,
    context: Annotated[
        str, typer.Option("--context", "-c", help="Tokens of the text, as in 4k,32k, timed steps included.")
    ] = "4k",
    budget: Annotated[
        str, typer.Option("--budget", help=f"Tokens that every policy holds, as in 1k,2k; {OWN}: as its params say.")
    ] = "1k",
    batch: Annotated[str, typer.Option("--batch", "-b", help="Rows, as in 1,8.")] = "1",
    new_tokens: Annotated[str, typer.Option("--new-tokens", "-n", help="Steps that are timed for each arm.")] = "64",
    against: Annotated[
        str, typer.Option("--against", help=f"What to hold policies against: some of {', '.join(AGAINST)}; or none.")
    ] = "dense,dense-at-budget",
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Tokens that the model reads; full caches are filled up with random numbers."),
    ] = None,
    seen: Annotated[
        str | None,
        typer.Option("--seen", metavar="EARLY,LATE", help="Instead: a step after so many tokens, as in 2k,50k."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Of the equal-memory table, as in 80GB; by default the device's.")
    ] = None,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Run the largest batches of the equal-memory table as well.")
    ] = False,
    settings: Settings = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Fewer layers of a shape.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16; the model's own.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; by default a GPU.")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the steps; by default on CUDA only.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="Who computes attention: auto, torch, triton.")] = "auto",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns that arms take.")] = 16,
    launches: Annotated[bool, typer.Option("--launches/--no-launches", help="Count launches of a step.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of the random weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Try what would not fit into memory.")] = False,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Write the report as JSON.")] = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="FILE", help="Hold ratios against a saved report.")
    ] = None,
    max_regress: Annotated[
        str | None, typer.Option("--max-regress", help="How far a ratio of --compare may fall; 5% by default.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a PNG; needs matplotlib.")] = None,
    json: Json = False,
) -> None:
    """Time decode steps under policies and under full caches, in turn, and say what was won and what was lost."""
    if model is not None and (shape is not None or layers is not None):
        raise UsageError(
            f"--model and {'--shape' if shape else '--layers'} do not go together: --layers cuts a --shape"
        )
    if max_regress is not None and compare is None:
        raise UsageError("--max-regress bounds how far ratios fall below a saved report; give one with --compare")
    files = Files(save, compare, plot, share(max_regress or "5%"))
    _check_files(files)
    extra = Extra(None if memory is None else size(memory), throughput, None if seen is None else _pair(seen))
    asked: dict[str, Any] = {
        "contexts": numbers(context, "--context"),
        "budgets": [None] if budget == OWN else numbers(budget, "--budget"),
        "batches": numbers(batch, "--batch"),
        "steps": numbers(new_tokens, "--new-tokens", most=1)[0],
        "rounds": rounds,
        "prompt": None if prompt is None else numbers(prompt, "--prompt", most=1)[0],
        "against": references(against),
        "backend": one_of(backend, ("auto", "torch", "triton"), "--backend"),
        "launches": launches,
        "force": force,
    }
    given = parse_settings(settings)
    policies = [load_policy(spec) for spec in specs]
    with_settings(policies, given, {})  # refuses what fits none of them, before a model is made
    labels = distinct(specs, [policy.name for policy in policies])
    config_named(shape or DEFAULT_SHAPE)
    from kvpolicy.lab.bench.quiet import quiet_profiler

    quiet_profiler()
    from kvpolicy.lab.bench.measuring import Bench, Options, Subject

    with progress() as tell:
        tell(f"making {model or shape or DEFAULT_SHAPE}")
        subject_model = _model(model, shape, layers, dtype, device, seed)
        compiled = subject_model.device.type == "cuda" if compile is None else compile
        subjects = [
            Subject(label, policy, {name: value for name, value in given.items() if name in policy.params})
            for label, policy in zip(labels, policies, strict=True)
        ]
        bench = Bench(subject_model, subjects, Options(compile=compiled, **asked), tell)
        name = model or f"{shape or DEFAULT_SHAPE}, {subject_model.config.num_hidden_layers} layers, random weights"
        report = measure(bench, f"{name}, {bench.shape.dtype}", extra)
    if processes().first:
        finish(report, files, json)


def measure(bench: Bench, name: str, extra: Extra) -> Report:
    """The report: rows of equal batch and of equal memory, or what growth costs.

    Raises:
        UsageError: a row that makes no sense, does not fit, or a policy that evicted nothing.
    """
    from kvpolicy.lab.bench.capacity import capacities
    from kvpolicy.lab.bench.environment import environment
    from kvpolicy.lab.bench.memory import total
    from kvpolicy.lab.bench.rows import Report
    from kvpolicy.lab.bench.seen import growths

    if extra.seen is None:
        report = bench.run(name)
        report.memory = extra.memory or total(bench.device)
        memory = report.memory
        report.capacities = processes().told(lambda: list(capacities(bench, memory, run=extra.throughput)))
    else:
        report = Report(name, bench.device_name, bench.bandwidth, bench.weights, total(bench.device))
        report.growths = growths(bench, extra.seen)
        report.notes += bench.notes
    report.environment = environment(bench.device)
    report.command = f"kvpolicy {' '.join(sys.argv[1:])}"
    return report


def finish(report: Report, files: Files, json: bool) -> None:
    """Show a report, write what was asked for, and judge it.

    Raises:
        KvpolicyError: a ratio fell by more than allowed; after everything was shown.
    """
    from kvpolicy.lab.bench.compare import compare, load, save
    from kvpolicy.lab.bench.picture import picture
    from kvpolicy.lab.bench.tables import remarks, tables

    told = report.to_dict()
    found = None if files.compare is None else compare(load(files.compare), told, files.max_regress)
    if json:
        output.json_object(told | ({} if found is None else {"comparison": _comparison_facts(found)}))
    else:
        for table in tables(report):
            _print(table)
        for line in remarks(report):
            output.data(escape(line))
        if found is not None:
            _show_comparison(found, files)
    if files.save is not None:
        save(files.save, told)
        output.note(f"saved {escape(str(files.save))}")
    if files.plot is not None:
        output.write_bytes(files.plot, picture(report))
        output.note(f"wrote {escape(str(files.plot))}")
    if found is not None and found.worse:
        worst = min(found.worse, key=lambda change: change.change)
        raise KvpolicyError(
            f"{len(found.worse)} of {len(found.changes)} ratios fell by more than {files.max_regress:.1%}, most of all "
            f"{worst.what}: {worst.before:.3f} then, {worst.now:.3f} now"
        )


def _print(table: Any) -> None:
    output.table(table.columns, [[escape(cell) for cell in row] for row in table.rows], title=table.title)
    output.data("")


def _show_comparison(found: Comparison, files: Files) -> None:
    from kvpolicy.lab.bench.tables import comparison

    _print(comparison(found, str(files.compare)))
    lines = [*found.notes, *(f"only then: {name}" for name in found.only_before)]
    for line in [*lines, *(f"only now: {name}" for name in found.only_now)]:
        output.data(escape(line))


def _comparison_facts(found: Comparison) -> dict[str, Any]:
    changes = [vars(change) | {"change": change.change} for change in found.changes]
    return vars(found) | {"changes": changes, "worse": len(found.worse)}


def _model(
    model: str | None, shape: str | None, layers: int | None, dtype: str | None, device: str | None, seed: int
) -> Any:
    if model is not None:
        from kvpolicy.models import load_model

        loaded, _ = load_model(model, device=device, dtype=dtype, notify=lambda line: output.note(escape(line)))
        return loaded
    from kvpolicy.lab.bench.models import random_model
    from kvpolicy.models.load import place_of

    return random_model(shape or DEFAULT_SHAPE, layers=layers, dtype=dtype, device=place_of(device), seed=seed)


@contextmanager
def progress() -> Iterator[Any]:
    """Says on stderr what is being done: one line that changes on a terminal, else a line for each part; yields what to
    tell it."""
    console = output.stderr()
    if output.is_quiet():
        yield lambda text: None
    elif console.is_terminal:
        with console.status("") as status:
            yield lambda text: status.update(escape(text))
    else:
        yield lambda text: None if ": round" in text else output.note(escape(text))


# Reading arguments ---------------------------------------------------------------------------------------------------


def numbers(text: str, flag: str, most: int | None = None) -> list[int]:
    """`4k,32k` as numbers of at least 1, each once. Raises BadParameter."""
    found = list(dict.fromkeys(tokens(part, flag) for part in text.split(",")))
    if 0 in found or (most is not None and len(found) > most):
        need = "one number" if most == 1 else "numbers with commas between them"
        raise typer.BadParameter(f"{text!r}: {need} of at least 1 are needed, as in 1 or 4k", param_hint=flag)
    return found


def references(text: str) -> list[str]:
    """`dense,hf-static` as names. Raises UsageError."""
    names = [] if text == "none" else list(dict.fromkeys(part.strip() for part in text.split(",")))
    return [one_of(name, AGAINST, "--against") for name in names]


def one_of(word: str, known: Sequence[str], flag: str) -> str:
    """A word that must be one of some. Raises UsageError."""
    if word not in known:
        raise UsageError(f"{flag} {word!r}: {nearest(word, known)}")
    return word


def share(text: str) -> float:
    """`5%` or `.05`. Raises BadParameter."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{text!r} is no share from 0 to 1, as in 5% or .05", param_hint="--max-regress")
    return value


def size(text: str) -> int:
    """`80GB`, `512MB`, `139GiB` in bytes. Raises BadParameter."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size of memory; write it as 80GB or 512MiB", param_hint="--memory")
    power = " KMGT".index(match[2].upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _pair(text: str) -> tuple[int, int]:
    lengths = [tokens(part, "--seen") for part in text.split(",")]
    if len(lengths) != 2 or not 0 < lengths[0] < lengths[1]:
        raise UsageError(f"--seen {text}: give two lengths, the smaller first, as in --seen 2k,50k")
    return lengths[0], lengths[1]


def _check_files(files: Files) -> None:
    """Refuse before the long part what could not be written or read after it."""
    if files.plot is not None:
        from kvpolicy.lab.chart import require_matplotlib

        require_matplotlib("--plot")
    for path in (files.save, files.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    if files.compare is not None and not files.compare.is_file():
        raise UsageError(f"cannot read {files.compare}: there is no such file; give one that bench --save wrote")
