"""`kvpolicy simulate`: what policies keep of a text, and what it costs them, as a picture. No model, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import output, strip
from kvpolicy.cli.arguments import Json, Settings, Specs, parse_settings
from kvpolicy.cli.texts import SPELLING, Source, source, with_settings
from kvpolicy.cli.watching import watched
from kvpolicy.errors import KvpolicyError, UsageError
from kvpolicy.language import load_policy
from kvpolicy.language.nodes import Scalar, shown
from kvpolicy.language.vocabulary import nearest
from kvpolicy.models.processes import processes

if TYPE_CHECKING:
    from kvpolicy.lab.simulation import Course, Simulation

TOGETHER = True

EPILOG = (
    "Examples: kvpolicy simulate raas h2o --pattern milestone,at=40,until=90 --set budget=32 --set page_size=4 "
    "--set heavy=16 --set recent=16; kvpolicy simulate my.yaml --test 1 --watch; kvpolicy simulate scope-slide "
    "--trace chat.safetensors --html chat.html --fail-under mass=.95. A pattern's arguments follow its name, with "
    "commas; lists stand in brackets, as in at=[3,11]; a whole mapping from a policy's tests will do as well. "
    "Exit code 1: --fail-under."
)

METRICS = ("mass", "min-mass")
"""What ``--fail-under`` knows: the share of the attention that is kept on average, and at the worst moment."""


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    specs: Sequence[str]
    settings: dict[str, str]
    sources: tuple[str | None, str | None, str | None]
    changes: dict[str, Any]
    place: dict[str, int | None]
    html: Path | None
    png: Path | None
    limits: dict[str, float]
    json: bool


def run(
    specs: Specs,
    pattern: Annotated[
        str | None, typer.Option("--pattern", metavar="NAME,KEY=VALUE,…", help=f"Synthetic attention, {SPELLING}.")
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            "--test", metavar="NAME|NUMBER", help="The attention of a test of the first SPEC, and its params."
        ),
    ] = None,
    trace: Annotated[
        str | None, typer.Option("--trace", metavar="FILE", help="Attention recorded from a model.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Prompt tokens; 8,16 for two rows.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Tokens to generate.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", min=1, help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", min=1, help="KV heads.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Layers.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the pattern's random numbers.")] = None,
    settings: Settings = None,
    layer: Annotated[int | None, typer.Option("--layer", help="This layer alone; else all count, 0 is shown.")] = None,
    head: Annotated[int | None, typer.Option("--head", help="This KV head alone; else all count, 0 is shown.")] = None,
    row: Annotated[int | None, typer.Option("--row", help="This row alone; else all count, 0 is shown.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write a picture; needs matplotlib.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Run again whenever a SPEC's file changes; Ctrl-C ends.")
    ] = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option("--fail-under", metavar="mass=.95", help="Exit with 1 below it; mass or min-mass, repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Show which tokens policies keep of a text, moment by moment, and the attention they lose. Needs no model."""
    counts = {"steps": steps, "heads": heads, "kv_heads": kv_heads, "layers": layers, "seed": seed}
    changes = {name: number for name, number in counts.items() if number is not None}
    request = Request(
        specs,
        parse_settings(settings),
        (pattern, test, trace),
        changes | ({} if prompt is None else {"prompt": prompts(prompt)}),
        {"layer": layer, "row": row, "head": head},
        html,
        png,
        limits(fail_under or ()),
        json,
    )
    if png is not None:
        from kvpolicy.lab.chart import require_matplotlib

        require_matplotlib("--png")
    if not watch:
        perform(request)
        return
    if processes().count > 1:
        raise UsageError("--watch waits for one person at one terminal; run it in one process")
    if json or "-" in specs:
        raise UsageError(f"--watch shows pictures of files, and does not go with {'--json' if json else '- (stdin)'}")
    for _ in watched([*specs, *([trace] if trace else [])]):
        try:
            perform(request)
        except KvpolicyError as fault:
            output.error(fault)


def perform(request: Request) -> None:
    """One simulation: read, run, show, judge.

    Raises:
        KvpolicyError: of any kind; after everything was shown, where a limit was missed.
    """
    from kvpolicy.lab.simulation import simulate

    policies = [load_policy(spec) for spec in request.specs]
    origin = source(*request.sources, policies[0]).changed(request.changes)
    policies = with_settings(policies, request.settings, origin.params)
    said = origin.text(policies[0])
    labels = distinct(request.specs, [policy.name for policy in policies])

    def simulated(number: int) -> Simulation:
        with progress(labels[number]) as tell:
            return simulate(policies[number], said, label=labels[number], progress=tell, **request.place)

    here = processes()
    simulations = here.spread(range(len(policies)), simulated)
    missed = list(failures(simulations, request.limits))
    if here.first:
        draw(request, origin, simulations)
    if request.json:
        facts = [_facts(spec, simulation) for spec, simulation in zip(request.specs, simulations, strict=True)]
        output.json_object({**_text_facts(origin, simulations), "specs": facts, "failed": missed})
    else:
        for line in strip.page(simulations, origin.title, get_terminal_size((100, 24)).columns):
            output.data(line)
    if missed:
        raise KvpolicyError("; ".join(missed))


def draw(request: Request, origin: Source, simulations: Sequence[Simulation]) -> None:
    """Write the files that were asked for."""
    for path, kind in ((request.html, "html"), (request.png, "png")):
        if path is None:
            continue
        if kind == "html":
            from kvpolicy.lab.web_page import page

            data = page(simulations, origin.title).encode()
        else:
            from kvpolicy.lab.chart import chart

            data = chart(simulations, origin.title)
        output.write_bytes(path, data)
        output.note(f"wrote {path}")


def distinct(specs: Sequence[str], names: Sequence[str]) -> list[str]:
    """What policies are called: by their names, by their files where these are alike, by their paths if need be."""
    files = [Path(spec).name if names.count(name) > 1 else name for spec, name in zip(specs, names, strict=True)]
    return [spec if files.count(file) > 1 else file for spec, file in zip(specs, files, strict=True)]


@contextmanager
def progress(label: str) -> Iterator[Any]:
    """A bar on stderr while a policy runs, where a person waits; yields what to tell (t, steps)."""
    console = output.stderr()
    if output.is_quiet() or not console.is_terminal:
        yield None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(label)
        yield lambda t, steps: bar.update(task, completed=t, total=max(1, steps))


def prompts(text: str) -> Any:
    """`16`, or `8,16` for two rows. Raises BadParameter."""
    parts = [Scalar(part.strip(), plain=True).typed for part in text.split(",")]
    if not all(isinstance(part, int) and part >= 0 for part in parts):
        raise typer.BadParameter(
            f"{text!r} is not a number of tokens, nor one per row as in 8,16", param_hint="--prompt"
        )
    return parts if len(parts) > 1 else parts[0]


def limits(items: Sequence[str]) -> dict[str, float]:
    """`["mass=.95", …]` as numbers. Raises UsageError."""
    found: dict[str, float] = {}
    for item in items:
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in METRICS:
            raise UsageError(f"--fail-under {shown(item)!r}: {nearest(name, METRICS)}, as in --fail-under mass=.95")
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)(%?)", value)
        share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
        if not 0 <= share <= 1:
            raise UsageError(f"--fail-under {shown(item)!r}: a share from 0 to 1 is needed, as in .95 or 95%")
        if name in found:
            raise UsageError(f"--fail-under gives {name} twice")
        found[name] = share
    return found


def failures(simulations: Sequence[Simulation], asked: dict[str, float]) -> Iterator[str]:
    """A sentence for each limit that a policy misses."""
    for simulation in simulations:
        worst = simulation.worst
        when = f"t = {worst.t[worst.worst]}, layer {worst.layer}, row {worst.row}, KV head {worst.head}"
        said = {
            "mass": (simulation.mean_mass, f"on average (at worst {simulation.min_mass:.1%}, at {when})"),
            "min-mass": (simulation.min_mass, f"at worst (at {when})"),
        }
        for name, least in asked.items():
            share, how = said[name]
            if share < least:
                yield f"{simulation.label} keeps {share:.1%} of the attention {how}; --fail-under asks for {least:.1%}"


# For machines ----------------------------------------------------------------------------------------------------


def _text_facts(origin: Source, simulations: Sequence[Simulation]) -> dict[str, Any]:
    from kvpolicy.lab.simulation import WANTED

    shape = simulations[0].plan.geometry
    course = simulations[0].shown
    return {
        "attention": dict(origin.arguments),
        "layers": shape.layers,
        "query_heads": shape.query_heads,
        "kv_heads": shape.kv_heads,
        "rows": simulations[0].plan.batch,
        "prompt": course.prompt,
        "tokens": course.length,
        "wanted_above_even_share": WANTED,
    }


def _facts(spec: str, simulation: Simulation) -> dict[str, Any]:
    """One policy: totals over every KV head that counted, and the course of the one that is shown."""
    policy = simulation.policy
    return {
        "spec": spec,
        "policy": policy.name,
        "digest": policy.digest,
        "params": {name: param.value.text for name, param in policy.params.items()},
        "kv_heads_counted": len(simulation.courses),
        "mean_mass": simulation.mean_mass,
        "min_mass": simulation.min_mass,
        "evicted": simulation.evicted,
        "updates": simulation.updates,
        "shown": _course_facts(simulation.shown),
    }


def _course_facts(course: Course) -> dict[str, Any]:
    from kvpolicy.lab.simulation import GONE

    budgets = [[None if number != number else int(number) for number in line] for line in course.budget.tolist()]
    states = zip(*(getattr(course.states, name).tolist() for name in ("token", "start", "stop", "state")), strict=True)
    return {
        "layer": course.layer,
        "row": course.row,
        "head": course.head,
        "mean_mass": course.mean_mass,
        "min_mass": course.min_mass,
        "t": course.t.tolist(),
        "newest": course.newest.tolist(),
        "mass": [round(share, 6) for share in course.mass.tolist()],
        "evicted": course.evicted.tolist(),
        "pools": [
            {"name": name, "bound": bound, "resident": resident, "budget": budget}
            for name, bound, resident, budget in zip(
                course.pools, course.bounds, course.resident.tolist(), budgets, strict=True
            )
        ],
        "losses": [vars(loss) for loss in course.losses],
        "never_wanted": course.never_wanted,
        "states": [
            {"token": token, "from": start, "to": stop}
            | ({"state": "evicted"} if state == GONE else {"state": "safe" if state % 2 else "ranked"})
            | ({} if state == GONE else {"pool": course.pools[(state - 2) // 2]})
            for token, start, stop, state in states
        ],
    }
