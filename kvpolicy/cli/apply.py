"""`kvpolicy apply`: put a policy under a model, let it write, and account for what was kept."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.cli.arguments import Json, Model, PromptFile, PromptText, Settings, Spec, parse_settings
from kvpolicy.cli.page import mib
from kvpolicy.cli.picture import strip
from kvpolicy.errors import UntestedWarning, UsageError
from kvpolicy.language import Policy, load_policy
from kvpolicy.models import builtin_models
from kvpolicy.models.processes import processes

if TYPE_CHECKING:
    from kvpolicy.lab.running import Outcome, Request

TOGETHER = True

EPILOG = (
    "Examples: kvpolicy apply raas --set budget=200; kvpolicy apply scope-slide builtin:smollm2 -f story.txt --set "
    "alpha=512; kvpolicy apply my.yaml ./my-model -p 'Once' --compare-dense --json. Ctrl-C ends the text and still "
    "shows the account."
)


def run(
    spec: Spec,
    model: Model = "builtin:tiny",
    prompt: PromptText = None,
    file: PromptFile = None,
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate.")] = 256,
    settings: Settings = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the steps; by default on CUDA only.")
    ] = None,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Let the full cache read along, and compare at every token.")
    ] = False,
    generic: Annotated[
        bool, typer.Option("--generic", help="Try a model of a type that kvpolicy does not know, untested.")
    ] = False,
    save: Annotated[Path | None, typer.Option("--save", help="Save model, tokenizer and policy to a folder.")] = None,
    must_evict: Annotated[
        bool, typer.Option("--must-evict", help="Exit with 1 if the policy evicts nothing or exceeds its bound.")
    ] = False,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; by default a GPU.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16; the model's own.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the likeliest of this mass.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the model's chat template if any.")] = None,
    json: Json = False,
) -> None:
    """Generate text under a policy; the text streams to stdout, and a table says what was kept of it."""
    policy = load_policy(spec, set=parse_settings(settings))
    text = read_prompt(prompt, file, model, spec)
    _check_folder(save)
    from kvpolicy.lab.running import Request, run_policy
    from kvpolicy.models import load_model
    from kvpolicy.patching import applied

    here = processes()
    request = Request(text, new_tokens, compile, chat, temperature, top_p, seed, compare_dense, generic)
    with output.busy(f"loading {model}"):
        loaded, tokenizer = load_model(
            model, device=device, dtype=dtype, shard=True, notify=lambda line: output.note(escape(line))
        )
    output.note(f"[dim]{escape(introduction(policy, model, request, str(loaded.device), here.count))}[/]")
    write = writer(json)
    silent = warnings.catch_warnings(action="ignore", category=UntestedWarning)  # `warn` says it
    with asked_to_stop() as stop, silent:
        outcome = run_policy(
            loaded, tokenizer, model, policy, request, write=write, stop=lambda: here.any(stop()),
            tell=partial(progress, json),
        )  # fmt: skip
    write("\n")
    if save is not None:
        with (
            warnings.catch_warnings(action="ignore", category=UntestedWarning),
            applied(loaded, policy, generic=generic),
        ):
            loaded.save_pretrained(save)
            if here.first:
                tokenizer.save_pretrained(save)
        output.note(f"saved to {escape(str(save))}; kvpolicy.from_pretrained brings model and policy back")
    if json:
        output.json_object(outcome.to_dict())
    else:
        show(outcome)
    warn(outcome)
    if outcome.ended == "interrupted":
        raise typer.Exit(130)
    if must_evict and (not outcome.evicted or outcome.resident_peak > outcome.resident_bound):
        raise typer.Exit(1)


def read_prompt(prompt: str | None, file: Path | None, model: str, spec: str) -> str:
    """The prompt's text: given, in a file, on stdin, or the one that ships for a built-in model.

    Raises:
        UsageError: both or neither were given, or the file cannot be read, or it is empty.
    """
    if prompt is not None and file is not None:
        raise UsageError("-p and -f both give a prompt; drop one")
    if file is not None and str(file) == "-":
        if spec == "-":
            raise UsageError("the policy and the prompt cannot both come from stdin")
        text = sys.stdin.read()
    elif file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(f"cannot read the prompt from {file}: {reason}") from None
    elif prompt is not None:
        text = prompt
    else:
        found = shipped_prompt(model)
        if found is None:
            raise UsageError("give a prompt with -p TEXT or -f FILE")
        text = found
    if not text.strip():
        raise UsageError("the prompt is empty; give some text with -p or -f")
    return text


def shipped_prompt(model: str) -> str | None:
    """The prompt that ships for a built-in model, None for any other."""
    return next((known.prompt() for known in builtin_models() if known.name == model), None)


def _check_folder(save: Path | None) -> None:
    if save is None:
        return
    try:
        save.mkdir(parents=True, exist_ok=True)
        (save / ".kvpolicy").touch()
        (save / ".kvpolicy").unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot save to {save}: {error.strerror}") from None


def progress(json: bool, line: str) -> None:
    """A remark in the middle of the text, on a line of its own."""
    if not json and sys.stdout.isatty() and not output.is_quiet():
        print(file=sys.stderr)
    output.note(f"[dim]{escape(line)}[/]")


def introduction(policy: Policy, model: str, request: Request, device: str, ranks: int) -> str:
    """What is about to run, and whether it is compiled and why."""
    compiled, why = request.compiles(device, ranks=ranks)
    waits = "so the first steps take a while" if compiled is True else "and tokens come eagerly until then"
    how = f"compiled ({why}), {waits}" if compiled else f"not compiled ({why})"
    where = (
        device if ranks == 1 else f"{ranks} processes, each with {device.partition(':')[0]} and its part of the heads"
    )
    return f"{policy.name} under {model} on {where}, {how}"


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; a second one interrupts at once. Only a main thread can listen."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def press(number: int, frame: object) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt
        output.note("\n[dim]stopping after this token; Ctrl-C again to leave at once[/]")

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def writer(json: bool) -> Any:
    """Takes a text piece by piece as it is written: to stdout, or to stderr where that is for a JSON object."""
    stream = sys.stderr if json else sys.stdout

    def write(text: str) -> None:
        if not (json and output.is_quiet()):
            stream.write(text)
            stream.flush()

    return write


def show(outcome: Outcome) -> None:
    """The account, as a table and a few lines."""
    output.data("")
    rows = [
        [
            escape(name),
            *(f"{pool[key]:,}" for key in ("kept", "bound", "peak", "slots")),
            f"{pool['evicted']:,}" + (f" ({pool['evicted_per_head']:,.0f} a head)" if pool["evicted"] else ""),
        ]
        for name, pool in outcome.pools.items()
    ]
    output.table(["pool", "kept", "bound", "peak", "slots", "evicted"], rows)
    output.data(
        "[dim]tokens per layer and KV head, the most of any: kept and bound after an update, peak at any time[/]\n"
    )
    for name, text in account(outcome):
        output.data(f"{name:<12} {escape(text)}")


def account(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """The lines below the table: (what, how much of it)."""
    ended = {"text": "the text ended there", "length": "as many as asked for", "interrupted": "interrupted"}
    asked = "" if outcome.ended == "length" else f" of {outcome.max_new_tokens:,}"
    yield "tokens", f"{outcome.prompt_tokens:,} prompt, {outcome.new_tokens:,}{asked} new ({ended[outcome.ended]})"
    if outcome.untested_type is not None:
        yield (
            "untested",
            f"kvpolicy does not know models of type {outcome.untested_type}; its layers were found by their structure",
        )
    planned = "as planned" if outcome.cache_bytes == outcome.planned_cache_bytes else "NOT as planned"
    each = f" in each of {outcome.ranks} processes" if outcome.ranks > 1 else ""
    saved = 1 - outcome.cache_bytes / max(1, outcome.dense_cache_bytes)
    share = f"{abs(saved):.0%} {'less' if saved >= 0 else 'more'}"
    yield (
        "cache",
        f"{mib(outcome.cache_bytes)}{each}, {planned}; the full cache takes {mib(outcome.dense_cache_bytes)}: {share}",
    )
    kept = f"at most {outcome.resident_peak:,} tokens after an update (bound {outcome.resident_bound:,})"
    yield "resident", f"{kept}, {outcome.held_peak:,} during a step ({outcome.slots:,} slots)"
    if len(outcome.residents) > 1:
        yield "over time", f"{strip([tokens for _, tokens in outcome.residents])}"
    yield "speed", f"{outcome.tokens_per_second:.1f} tokens/s, after {outcome.prompt_seconds:.1f} s for the prompt"
    if outcome.compile and not outcome.graphs:
        yield "compiled", f"{outcome.compile_reason}: not before the text ended, so every step ran eagerly"
    elif outcome.compile:
        done = f"{outcome.graphs} graphs, {outcome.graph_breaks} graph breaks, {outcome.recompiles} recompiles"
        yield "compiled", f"{outcome.compile_reason}: {done}, in {outcome.compile_seconds:.0f} s"
    else:
        yield "compiled", f"no: {outcome.compile_reason}"
    if outcome.agreement is not None and outcome.agreement["tokens"]:
        yield "full cache", agreement_words(outcome.agreement)


def agreement_words(agreement: dict[str, Any]) -> str:
    """How the full cache would have gone on at every token of the text."""
    first = agreement["first_divergence"]
    where = "never parts from it" if first is None else f"parts from it first at token {first + 1:,}"
    return (
        f"on the same text it puts the same token first at {agreement['top1']:.1%} of the steps; the policy {where}; "
        f"mean KL {agreement['mean_kl']:.4f} nats, largest {agreement['max_kl']:.3f}"
    )


def warn(outcome: Outcome) -> None:
    """Say loudly what the run says nothing about, also where remarks are off: a model of a type that nobody tested, or
    a policy that evicted nothing."""
    if outcome.untested_type is not None:
        output.stderr().print(
            f"[bold yellow]UNTESTED:[/] kvpolicy does not know models of type {escape(outcome.untested_type)}. It "
            "found the layers by their structure, and over a few tokens, all kept, they gave the model's own logits.",
            soft_wrap=True,
        )
    if outcome.evicted or not outcome.can_evict:
        return
    numbers = " ".join(f"{name}={value}" for name, value in outcome.params.items())
    smaller = f"smaller numbers with --set (here {numbers}), " if numbers else ""
    output.stderr().print(
        f"[bold yellow]NOTHING WAS EVICTED:[/] {outcome.prompt_tokens + outcome.new_tokens:,} tokens stay within every "
        f"budget of {escape(outcome.policy)}, so this was the full cache. Try {escape(smaller)}a longer prompt or a "
        "larger --max-new-tokens.",
        soft_wrap=True,
    )
