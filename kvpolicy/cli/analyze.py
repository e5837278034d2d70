"""`kvpolicy analyze`: what the attention of a model is made of, and a first policy for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.cli.apply import asked_to_stop, read_prompt, writer
from kvpolicy.cli.arguments import Json, Model, PromptFile, PromptText
from kvpolicy.cli.trace import read_layers
from kvpolicy.errors import UsageError

if TYPE_CHECKING:
    from kvpolicy.lab.analyze.reading import Passage
    from kvpolicy.lab.analyze.summary import Analysis

EPILOG = (
    "Examples: kvpolicy analyze builtin:tiny --window 8 --silence 24; kvpolicy analyze builtin:smollm2 -f story.txt -n "
    "500 --html story.html; kvpolicy analyze builtin:smollm2 --dataset answers.jsonl --texts 5 --suggest mine.yaml. A "
    "dataset's line has a prompt and, unless the model is to write it, an output. docs/analyze.md says what the "
    "classes are."
)


def run(
    model: Model = "builtin:tiny",
    prompt: PromptText = None,
    file: PromptFile = None,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", metavar="FILE", help="Texts to read: .jsonl, or one as .txt.")
    ] = None,
    texts: Annotated[int | None, typer.Option("--texts", min=1, help="So many of the dataset's; all.")] = None,
    new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=0, help="Tokens to generate where no output is given.")
    ] = 256,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Cut texts of a dataset after so many tokens.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Layers to listen to, as in 0..3 or 0,7,15; by default all.")
    ] = None,
    window: Annotated[int, typer.Option("--window", min=1, help="Queries to which a token is new.")] = 32,
    silence: Annotated[int, typer.Option("--silence", min=1, help="Queries whose silence makes a phoenix.")] = 64,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write a picture; needs matplotlib.")
    ] = None,
    suggest: Annotated[
        Path | None, typer.Option("--suggest", metavar="FILE", help="Write a policy that fits what was seen.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; by default a GPU.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16; the model's own.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template if any; not for datasets.")
    ] = None,
    json: Json = False,
) -> None:
    """Sort the tokens of a text into sinks, milestones, phoenixes and others, as a model's heads attend to them."""
    given = _prompts(prompt, file, dataset, texts, model)
    asked = read_layers(layers)
    check_files(html, png, suggest)
    from kvpolicy.lab.analyze.rules import Rules
    from kvpolicy.lab.running import Request
    from kvpolicy.models import load_model

    rules = Rules(local=window, silence=silence)
    with output.busy(f"loading {model}"):
        loaded, tokenizer = load_model(model, device=device, dtype=dtype, notify=lambda line: output.note(escape(line)))
    template = chat if dataset is None or chat is not None else False
    begun = time.perf_counter()
    requests = [
        (name, Request(text, new_tokens, chat=template, temperature=temperature, seed=seed), said)
        for name, text, said in given
    ]
    passages = list(_passages(loaded, tokenizer, requests, max_tokens, writer(json)))
    analysis = _read(loaded, model, passages, rules, asked, begun)
    show_files(analysis, html, png)
    if suggest is not None:
        from kvpolicy.lab.analyze.suggest import suggestion

        _write(suggest, suggestion(analysis, suggest.stem).encode())
        output.note(f"wrote {escape(str(suggest))}; try it: kvpolicy apply {escape(f'{suggest} {model}')}")
    if json:
        from kvpolicy.lab.analyze.summary import to_dict

        output.json_object(to_dict(analysis))
    else:
        from kvpolicy.cli.classes import show

        show(analysis)


def _prompts(
    prompt: str | None, file: Path | None, dataset: Path | None, texts: int | None, model: str
) -> list[tuple[str, str, str]]:
    """(name, prompt, what was written to it, if that is known). Raises UsageError."""
    if dataset is None:
        if texts is not None:
            raise UsageError("--texts says how many of a dataset's texts to read; give one with --dataset FILE")
        name = str(file) if file is not None else "the prompt"
        return [(name, read_prompt(prompt, file, model, ""), "")]
    if prompt is not None or file is not None:
        raise UsageError("--dataset brings its own prompts; drop -p and -f")
    from kvpolicy.lab.dataset import read_dataset

    return [(text.place, text.prompt, text.output) for text in read_dataset(dataset, most=texts)]


def _passages(model: Any, tokenizer: Any, requests: Sequence[Any], most: int | None, write: Any) -> Iterator[Passage]:
    """The texts to read; what no one has written, the model writes."""
    from kvpolicy.lab.analyze.reading import passage, written

    with asked_to_stop() as stop:
        for name, request, said in requests:
            if said or not request.max_new_tokens:
                yield passage(tokenizer, name, request, said, most)
                continue
            yield written(model, tokenizer, name, request, write=write, stop=stop)
            write("\n")
            if stop():
                return


def _read(
    model: Any, name: str, passages: Sequence[Passage], rules: Any, layers: Sequence[int], begun: float
) -> Analysis:
    from kvpolicy.lab.analyze.facts import facts
    from kvpolicy.lab.analyze.reading import read
    from kvpolicy.lab.analyze.summary import Analysis, versions
    from kvpolicy.lab.recording import layers_of
    from kvpolicy.plan import ModelGeometry

    governed = layers_of(model, ())
    known, group = layers_of(model, layers), ModelGeometry.from_config(model.base_model.config).group
    found = []
    for number, text in enumerate(passages, 1):
        with progress(f"reading {number} of {len(passages)}") as tell:
            tokens = read(model, text, rules, known, tell)
        found.append(facts(text.name, text.prompt, tokens, rules.local, group))
    return Analysis(name, rules, known, governed, tuple(found), time.perf_counter() - begun, versions())


@contextmanager
def progress(label: str) -> Iterator[Any]:
    """A bar on stderr, where a person waits; yields what to tell (tokens read, of how many)."""
    console = output.stderr()
    if output.is_quiet() or not console.is_terminal:
        yield lambda done, tokens: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(label)
        yield lambda done, tokens: bar.update(task, completed=done, total=tokens)


def check_files(*paths: Path | None) -> None:
    """Before the model is loaded: files could be written there, and drawn. Raises UsageError, MissingExtra."""
    if paths[1] is not None:
        from kvpolicy.lab.chart import require_matplotlib

        require_matplotlib("--png")
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            why = "it is a folder; name a file in it" if path.is_dir() else f"there is no folder {path.parent}"
            raise UsageError(f"cannot write {path}: {why}")


def show_files(analysis: Analysis, html: Path | None, png: Path | None) -> None:
    """Write the page and the picture that were asked for."""
    if html is not None:
        from kvpolicy.lab.analyze.page import page

        _write(html, page(analysis).encode())
        output.note(f"wrote {escape(str(html))}")
    if png is not None:
        from kvpolicy.lab.analyze.picture import picture

        _write(png, picture(analysis))
        output.note(f"wrote {escape(str(png))}")


def _write(path: Path, data: bytes) -> None:
    output.write_bytes(path, data)
