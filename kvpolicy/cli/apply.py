"""`kvpolicy apply`: put a policy under a model, let it write, and account for what was kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.status import Status

from kvpolicy.cli import output
from kvpolicy.cli.arguments import Json, Settings, Spec, parse_settings
from kvpolicy.cli.page import mib
from kvpolicy.errors import UsageError
from kvpolicy.language import Policy, load_policy

if TYPE_CHECKING:
    from kvpolicy.lab.running import Outcome, Request

EPILOG = (
    "Examples: kvpolicy apply raas; kvpolicy apply scope-slide builtin:smollm2 -f story.txt --set alpha=512; "
    "kvpolicy apply my.yaml ./my-model -p 'Once' --compare-dense --json."
)


def run(
    spec: Spec,
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="builtin:tiny, builtin:smollm2, a hub id, a folder, a .gguf file.")
    ] = "builtin:tiny",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A file with the prompt; - for stdin.")] = None,
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate.")] = 256,
    settings: Settings = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the steps; by default on CUDA only.")
    ] = None,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Ask the full cache what it thinks of the text.")
    ] = False,
    save: Annotated[Path | None, typer.Option("--save", help="Save model, tokenizer and policy to a folder.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; by default a GPU.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16; the model's own.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the model's chat template if any.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    json: Json = False,
) -> None:
    """Generate text under a policy; the text streams to stdout, and a table says what was kept of it."""
    policy = load_policy(spec, set=parse_settings(settings))
    text = read_prompt(prompt, file, model, spec)
    _check_folder(save)
    from kvpolicy.lab.running import Request, run_policy
    from kvpolicy.lab.running import compare_dense as agreement
    from kvpolicy.models import load_model
    from kvpolicy.patching import applied

    request = Request(text, new_tokens, compile, chat, temperature, seed)
    with busy(f"loading {model}"):
        loaded, tokenizer = load_model(model, device=device, dtype=dtype, notify=lambda line: output.note(escape(line)))
    output.note(f"[dim]{escape(introduction(policy, model, request, str(loaded.device)))}[/]")
    outcome = run_policy(loaded, tokenizer, model, policy, request, write=_writer(json))
    if not json:
        print()
    if compare_dense and outcome.token_ids:
        with busy("asking the full cache"):
            outcome.agreement = agreement(loaded, tokenizer, request, outcome)
    if save is not None:
        with applied(loaded, policy):
            loaded.save_pretrained(save)
            tokenizer.save_pretrained(save)
        output.note(f"saved to {escape(str(save))}; kvpolicy.from_pretrained brings model and policy back")
    if json:
        output.json_object(outcome.to_dict())
    else:
        show(outcome)
    if outcome.interrupted:
        raise typer.Exit(130)


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
    if model == "builtin:smollm2":
        return (files("kvpolicy.models") / "prompts" / "demo.txt").read_text(encoding="utf-8")
    if model == "builtin:tiny":
        from kvpolicy.models.tiny.task import make_problem

        return make_problem(0).prompt
    return None


def _check_folder(save: Path | None) -> None:
    if save is None:
        return
    try:
        save.mkdir(parents=True, exist_ok=True)
        (save / ".kvpolicy").touch()
        (save / ".kvpolicy").unlink()
    except OSError as error:
        raise UsageError(f"cannot save to {save}: {error.strerror}") from None


def introduction(policy: Policy, model: str, request: Request, device: str) -> str:
    """What is about to run, and whether it is compiled and why."""
    if request.compile is None and device.startswith("cuda"):
        why = "compiled, as on every GPU (--no-compile runs eagerly)"
    elif request.compile is None:
        why = "not compiled: on a CPU it costs half a minute and gains little (--compile forces it)"
    else:
        why = "compiled, as asked" if request.compile else "not compiled, as asked"
    return f"{policy.name} under {model} on {device}, {why}"


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on stderr while something takes time; nothing where nobody looks."""
    console = output.stderr()
    if not console.is_terminal or output.is_quiet():
        yield
        return
    with Status(f"{what} …", console=console):
        yield


def _writer(json: bool) -> Any:
    stream = sys.stderr if json else sys.stdout

    def write(text: str) -> None:
        if not (json and output.is_quiet()):
            stream.write(text)
            stream.flush()

    return write


def show(outcome: Outcome) -> None:
    """The account, as a table and a few lines."""
    rows = [
        [escape(name), str(pool["resident"]), str(pool["evicted"]), str(pool["peak"]), str(pool["bound"])]
        for name, pool in outcome.pools.items()
    ]
    output.data("")
    output.table(["pool", "kept", "evicted, all heads", "peak", "bound"], rows)
    share = outcome.cache_bytes / outcome.dense_cache_bytes if outcome.dense_cache_bytes else 1.0
    planned = "as planned" if outcome.cache_bytes == outcome.planned_cache_bytes else "NOT as planned"
    output.data(f"tokens       {outcome.prompt_tokens} prompt, {outcome.new_tokens} new")
    output.data(
        f"cache        {mib(outcome.cache_bytes)}, {planned}; the full cache takes {mib(outcome.dense_cache_bytes)} "
        f"({share:.0%})"
    )
    output.data(
        f"resident     at most {outcome.resident_peak} tokens per layer and KV head while a step ran, "
        f"{outcome.resident_bound} allowed after an update"
    )
    output.data(f"speed        {outcome.tokens_per_second:.1f} tokens/s after {outcome.prompt_seconds:.1f} s of prompt")
    steps = f"{outcome.graphs} graphs, {outcome.graph_breaks} breaks, {outcome.recompiles} recompiles"
    output.data(f"compiled     {steps if outcome.compile else 'no'}")
    if outcome.agreement is not None:
        output.data(
            f"full cache   would have chosen {outcome.agreement['top1']:.1%} of these tokens first; "
            f"mean log probability {outcome.agreement['mean_log_probability']:.3f}"
        )
    if outcome.evicted == 0 and outcome.policy != "dense":
        output.note(
            "[yellow]nothing was evicted: at these lengths the policy is the full cache; lower its budget with --set, "
            "or write more with --max-new-tokens[/]"
        )
