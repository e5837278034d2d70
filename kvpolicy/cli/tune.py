"""`kvpolicy tune`: the params of a policy that suit a model, its texts, and a memory or an agreement."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.cli.analyze import check_files
from kvpolicy.cli.apply import read_prompt
from kvpolicy.cli.arguments import Json, Model, PromptFile, Settings, Spec, parse_settings
from kvpolicy.cli.bench import size
from kvpolicy.cli.compare import progress
from kvpolicy.cli.fidelity import arm_alone
from kvpolicy.cli.trace import read_layers
from kvpolicy.errors import UsageError
from kvpolicy.language import Policy, loads_policy
from kvpolicy.language.library import fetch

if TYPE_CHECKING:
    from kvpolicy.lab.dataset import Text
    from kvpolicy.lab.fidelity.full_cache import Forced
    from kvpolicy.lab.tune.goal import Goal
    from kvpolicy.lab.tune.search import Tuning

EPILOG = (
    "Examples: kvpolicy tune scope-slide --memory 48KiB; kvpolicy tune h2o builtin:smollm2 -f story.txt -n 200 "
    "--agreement 0.95 --png h2o.png; kvpolicy tune raas ./my-model --dataset answers.jsonl --memory 512MiB --set "
    "page_size=16 -o mine.yaml. Memory is that of one row's cache at the lengths of the texts. Exit code 1: nothing "
    "that was measured agrees so well."
)

NEW_TOKENS = 256
"""That the model writes where a text has no output."""


@dataclass(frozen=True)
class Given:
    """The policy's text as it was read; ``policy`` has its own defaults, ``settings`` are what the user set."""

    text: str
    filename: str
    policy: Policy
    settings: dict[str, str]


def run(
    spec: Spec,
    model: Model = "builtin:tiny",
    memory: Annotated[
        str | None, typer.Option("--memory", help="The best agreement within this much cache, as in 512MiB.")
    ] = None,
    agreement: Annotated[
        str | None,
        typer.Option("--agreement", help="The least memory that agrees at this share of tokens, as in 0.99."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given repeatedly.")
    ] = None,
    file: PromptFile = None,
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", metavar="FILE", help="Texts: .jsonl with prompt and output, or one .txt."),
    ] = None,
    texts: Annotated[int | None, typer.Option("--texts", min=1, help="So many of the dataset's; all.")] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "--new-tokens",
            "-n",
            min=1,
            help=f"Of an output; {NEW_TOKENS} where the model writes it.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Search this param alone; repeatable.")
    ] = None,
    settings: Settings = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Settings to try on recorded attention.")] = 48,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Of them, how many the model runs.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.")] = 0,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Layers to record, as in 0..3 or 0,7,15; by default three of them.")
    ] = None,
    played: Annotated[
        int, typer.Option("--played", min=1, help="Generated tokens to play through a setting, of all texts.")
    ] = 256,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Texts that the model runs at once.")] = 8,
    to: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the policy there; POLICY-tuned.yaml.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite that file.")] = False,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write a picture; needs matplotlib.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; by default a GPU.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16; the model's own.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template if any; not for datasets.")
    ] = None,
    generic: Annotated[
        bool, typer.Option("--generic", help="Try a model of a type that kvpolicy does not know, untested.")
    ] = False,
    json: Json = False,
) -> None:
    """Search a policy's params, on recorded attention and then on the model, and write the policy that suits best."""
    goal = _goal(memory, agreement)
    given = _given(spec, parse_settings(settings), only or ())
    wanted = _texts(prompt, file, dataset, texts, model, spec)
    asked = read_layers(layers)
    target = to or Path(f"{given.policy.name}-tuned.yaml")
    check_files(target, png)
    if target.exists() and not force:
        raise UsageError(f"{target} exists; add --force to overwrite it, or give another name with -o")
    from kvpolicy.lab.tune.report import to_dict
    from kvpolicy.lab.tune.search import Options, not_reached, tune
    from kvpolicy.models import load_model

    with output.busy(f"loading {model}"):
        loaded, tokenizer = load_model(model, device=device, dtype=dtype, notify=lambda line: output.note(escape(line)))
    template = chat if dataset is None or chat is not None else False
    options = Options(trials, runs, seed, asked, played=played, batch=batch, generic=generic)
    forced = list(_forced(loaded, tokenizer, wanted, new_tokens, template, seed))
    with progress() as tell:
        tell = tell if output.stderr().is_terminal else arm_alone(tell)
        found = tune(
            loaded, tokenizer, model, given.policy, forced, goal, options, given=given.settings, only=only or (),
            tell=tell,
        )  # fmt: skip
    if png is not None:
        _draw(found, png)
    written = _write(found, given, target) if found.chosen is not None else None
    if json:
        output.json_object({**to_dict(found), "written": written and str(written), "command": _command()})
    else:
        show(found)
    if written is None:
        raise not_reached(found)
    output.note(f"wrote {escape(str(written))}; try it: kvpolicy apply {escape(f'{written} {model}')}")


def _goal(memory: str | None, agreement: str | None) -> Goal:
    """Raises UsageError, BadParameter."""
    from kvpolicy.lab.tune.goal import Goal

    if (memory is None) == (agreement is None):
        both = "--memory and --agreement ask for different things" if memory else "what should it suit?"
        raise UsageError(f"{both}: give one, --memory 512MiB for the best within it or --agreement 0.99 for the least")
    if memory is not None:
        return Goal(memory=size(memory))
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(%?)", str(agreement).strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--agreement {agreement}: a share above 0 and up to 1 is needed, as in 0.99 or 99%")
    return Goal(agreement=share)


def _given(spec: str, settings: dict[str, str], only: Sequence[str]) -> Given:
    """The policy; what cannot be set or searched is refused. Raises PolicyError, UsageError."""
    from kvpolicy.lab.tune.space import check_names

    text, filename = fetch(spec)
    loads_policy(text, filename, settings)
    policy = loads_policy(text, filename)
    check_names(policy, settings, only)
    return Given(text, filename, policy, settings)


def _texts(
    prompts: Sequence[str] | None, file: Path | None, dataset: Path | None, most: int | None, model: str, spec: str
) -> list[Text]:
    """Prompts, and what was written to them where that is known. Raises UsageError."""
    from kvpolicy.lab.dataset import Text, read_dataset

    if dataset is not None:
        if prompts or file is not None:
            raise UsageError("--dataset brings its own prompts; drop -p and -f")
        return read_dataset(dataset, most=most)
    if most is not None:
        raise UsageError("--texts says how many of a dataset's texts to read; give one with --dataset FILE")
    if prompts and file is not None:
        raise UsageError("-p and -f both give a prompt; drop one")
    given: Sequence[str | None] = prompts or [None]
    found = [read_prompt(prompt, file, model, spec) for prompt in given]
    name = str(file) if file is not None else "the prompt" if prompts else "the model's own prompt"
    numbered = [name] if len(found) == 1 else [f"prompt {number}" for number in range(1, len(found) + 1)]
    return [Text(number, text, "", numbered[number]) for number, text in enumerate(found)]


def _forced(
    model: Any, tokenizer: Any, texts: Sequence[Text], new: int | None, chat: bool | None, seed: int
) -> Iterator[tuple[str, Forced]]:
    """The ids of the texts; what no one has written, the model writes."""
    from kvpolicy.lab.analyze.reading import written
    from kvpolicy.lab.fidelity.full_cache import Forced, force_ids
    from kvpolicy.lab.running import Request

    for text in texts:
        if text.output:
            yield text.place, force_ids(tokenizer, text, most=new, chat=bool(chat))
            continue
        with output.busy(f"the model writes to {text.place}"):
            said = written(model, tokenizer, text.place, Request(text.prompt, new or NEW_TOKENS, chat=chat, seed=seed))
        yield text.place, Forced(text.number, said.ids[0, : said.prompt], said.ids[0, said.prompt :])


def show(run: Tuning) -> None:
    """What the model ran, and what to think of it."""
    from kvpolicy.lab.tune.report import COLUMNS, remarks, table

    searched = [[escape(axis.name), escape(axis.range)] for axis in run.space.axes]
    left = [[escape(name), escape(f"not searched: {why}")] for name, why in run.space.left.items()]
    output.table(("param", "values"), [*searched, *left], title=f"{run.policy.name} on {run.model}")
    output.data("")
    output.table(COLUMNS, [[escape(cell) for cell in row] for row in table(run)])
    output.data("")
    for line in remarks(run):
        output.data(escape(line))


def _write(run: Tuning, given: Given, target: Path) -> Path:
    from kvpolicy.lab.tune.writing import tuned

    output.write_file(target, tuned(run, given.text, given.filename, target.stem, _command()))
    return target


def _draw(run: Tuning, png: Path) -> None:
    from kvpolicy.lab.tune.picture import picture

    try:
        png.write_bytes(picture(run))
    except OSError as error:
        raise UsageError(f"cannot write {png}: {error.strerror}") from None
    output.note(f"wrote {escape(str(png))}")


def _command() -> str:
    return f"kvpolicy {shlex.join(sys.argv[1:])}"
