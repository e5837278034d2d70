"""`kvpolicy eval`: lm-evaluation-harness over a policy's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli.arguments import MODEL_HELP, Settings, Spec, parse_settings
from kvpolicy.cli.texts import with_settings
from kvpolicy.errors import UsageError
from kvpolicy.language import load_policy

EPILOG = (
    "Examples: kvpolicy eval raas meta-llama/Llama-3.2-1B-Instruct --budget 1024 -- --tasks gsm8k --limit 100; "
    "kvpolicy eval snapkv builtin:smollm2 --set budget=256 -- --include_path my_tasks --tasks mine --output_path out. "
    "What follows -- goes to lm-eval as it stands; lm-eval run --help lists it. The full cache: kvpolicy eval dense …"
)


def run(
    spec: Spec,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    harness: Annotated[
        list[str] | None, typer.Argument(metavar="-- ARGUMENTS…", help="What lm-eval is told: --tasks and the like.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", min=1, help="Tokens to hold, whatever the policy's params are called.")
    ] = None,
    settings: Settings = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16; the model's own.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; by default a GPU.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile generated steps.")] = False,
) -> None:
    """Run tasks of lm-evaluation-harness (lm-eval) on a model under a policy; needs the extra eval."""
    from kvpolicy.lab.harness.calling import arguments_of, call_harness, require_harness

    require_harness()
    given = parse_settings(settings)
    if "-" in (spec, model):
        raise UsageError("lm-eval reads a policy by its name or its path, not from stdin; write it to a file")
    with_settings([load_policy(spec)], given, {})  # refuses what fits it not, before anything is loaded
    name = str(Path(spec).resolve()) if Path(spec).is_file() else spec
    told = {"pretrained": model, "policy": name, **given}
    more = {"budget": budget, "dtype": dtype, "compile": compile or None}
    told |= {key: str(value) for key, value in more.items() if value is not None}
    call_harness(arguments_of(told, [*(harness or []), *(() if device is None else ("--device", device))]))
