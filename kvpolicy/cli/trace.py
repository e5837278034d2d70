"""`kvpolicy trace`: record what the attention of a model gets while it writes, to be replayed through policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.cli.apply import asked_to_stop, read_prompt, writer
from kvpolicy.cli.arguments import Json, Model, PromptFile, PromptText
from kvpolicy.cli.page import mib
from kvpolicy.errors import UsageError
from kvpolicy.language.base import Complaint

if TYPE_CHECKING:
    from kvpolicy.lab.recording import Recorded

EPILOG = (
    "Examples: kvpolicy trace -o tiny.safetensors; kvpolicy trace builtin:smollm2 -f story.txt -n 500 --layers 0..3 -o "
    "story.safetensors; kvpolicy simulate raas h2o --trace story.safetensors. Ctrl-C ends the text and still writes "
    "what was recorded."
)


def run(
    model: Model = "builtin:tiny",
    prompt: PromptText = None,
    file: PromptFile = None,
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0, help="Tokens to generate.")] = 256,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Layers to record, as in 0..3 or 0,7,15; by default all.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("trace.safetensors"),
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; by default a GPU.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16; the model's own.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the model's chat template if any.")] = None,
    json: Json = False,
) -> None:
    """Record the queries, keys and values that a model attends with, in a file that tests and simulations replay."""
    text = read_prompt(prompt, file, model, "")
    asked = read_layers(layers)
    check_writable(out)
    from kvpolicy.lab.recording import expected_bytes, layers_of, record
    from kvpolicy.lab.running import Request, encode
    from kvpolicy.models import load_model

    request = Request(text, new_tokens, chat=chat, temperature=temperature, seed=seed)
    with output.busy(f"loading {model}"):
        loaded, tokenizer = load_model(model, device=device, dtype=dtype, notify=lambda line: output.note(escape(line)))
    chosen = layers_of(loaded, asked)
    size = expected_bytes(loaded, chosen, encode(tokenizer, request).shape[1] + new_tokens)
    output.note(f"[dim]{escape(f'{len(chosen)} layers of {model}, at most {mib(size)}, to {out}')}[/]")
    write = writer(json)
    with asked_to_stop() as stop:
        recorded = record(loaded, tokenizer, model, request, out, chosen, write=write, stop=stop)
    write("\n")
    if json:
        output.json_object(recorded.to_dict())
    else:
        show(recorded)
    if recorded.ended == "interrupted":
        raise typer.Exit(130)


def show(recorded: Recorded) -> None:
    """What was recorded, and what it is good for."""
    from kvpolicy.testing.tokens import spelled

    ended = {"text": "the text ended there", "length": "as many as asked for", "interrupted": "interrupted"}
    tokens = f"{recorded.prompt_tokens:,} prompt, {recorded.new_tokens:,} new ({ended[recorded.ended]})"
    lines = {
        "trace": f"{recorded.path}, {mib(recorded.bytes)}, {recorded.dtype}, in {recorded.seconds:.1f} s",
        "tokens": tokens,
        "layers": spelled(recorded.layers),
    }
    output.data("")
    for name, text in lines.items():
        output.data(f"{name:<8} {escape(text)}")
    output.note(f"[dim]replay it: kvpolicy simulate raas --trace {escape(recorded.path)}[/]")


def read_layers(text: str | None) -> tuple[int, ...]:
    """`0..3`, `0,7,15` or both mixed; none where nothing is said. Raises UsageError."""
    from kvpolicy.testing.tokens import read_tokens

    if text is None:
        return ()
    items = [int(item) if item.strip().isdecimal() else item for item in text.split(",")]
    try:
        return read_tokens(items, 10**4)
    except Complaint as complaint:
        reason = complaint.reason.replace("position", "layer")
        raise UsageError(f"--layers {text!r}: {reason}; write it as in 0..3 or 0,7,15") from None


def check_writable(out: Path) -> None:
    """Before the model is loaded: a file could be written there. Raises UsageError."""
    if out.is_dir():
        raise UsageError(f"cannot write the trace to {out}: it is a folder; name a file in it")
    try:
        probe = out.with_name(f".{out.name}.kvpolicy")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write the trace to {out}: {error.strerror}") from None
