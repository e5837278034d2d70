"""Arguments that several verbs share, spelled and explained the same way everywhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli import output
from kvpolicy.errors import UsageError
from kvpolicy.language import shipped_policies
from kvpolicy.models import builtin_models

MODEL_HELP = f"{', '.join(model.name for model in builtin_models())}, a hub id, a folder, a .gguf file."

Spec = Annotated[
    str, typer.Argument(metavar="SPEC", help="A policy: a YAML file, the name of a shipped one, or - for stdin.")
]
Specs = Annotated[
    list[str], typer.Argument(metavar="SPEC…", help="Policies: YAML files, names of shipped ones, or - for stdin.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set a param of the policy; may be given repeatedly."),
]
Model = Annotated[str, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)]
PromptText = Annotated[
    str | None, typer.Option("--prompt", "-p", help="The prompt; built-in models have one of their own.")
]
PromptFile = Annotated[Path | None, typer.Option("--file", "-f", help="A file with the prompt; - for stdin.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]

ColorOption = Annotated[
    output.Color | None,
    typer.Option("--color", help="When to colour. The default, auto, is on a terminal, unless NO_COLOR is set."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]


def parse_settings(items: Sequence[str] | None) -> dict[str, str]:
    """`["budget=1k", …]` as a dict; the policy's own parser reads the values.

    Raises UsageError for an item without `=` and for a name set twice.
    """
    settings: dict[str, str] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not (equals and name.strip() and value.strip()):
            raise UsageError(f"--set {item!r} is not NAME=VALUE, for example --set budget=1024")
        if name.strip() in settings:
            raise UsageError(f"--set gives {name.strip()} twice")
        settings[name.strip()] = value.strip()
    return settings


def is_model(word: str) -> bool:
    """Whether a word can only be a model: built in, a `.gguf` file, a folder, or a hub id."""
    if word == "-" or word in shipped_policies() or word.endswith((".yaml", ".yml")):
        return False
    return word.startswith("builtin:") or word.endswith(".gguf") or Path(word).is_dir() or "/" in word


def with_display_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """`verb` that also takes --color and --quiet: people type them after the verb as often as before it."""

    def display(*, color: ColorOption = None, quiet: QuietOption = False) -> None:
        output.configure(color, quiet)

    extra = inspect.signature(display, eval_str=True).parameters
    signature = inspect.signature(verb, eval_str=True)

    @functools.wraps(verb)
    def run(**values: Any) -> Any:
        display(**{name: values.pop(name) for name in extra})
        return verb(**values)

    parameters = [item.replace(kind=item.KEYWORD_ONLY) for item in (*signature.parameters.values(), *extra.values())]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {item.name: item.annotation for item in parameters}
    return run
