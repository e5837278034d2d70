"""`kvpolicy list`: the policies, signals, models and architectures that are installed, read off the installation."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.markup import escape

from kvpolicy.architecture import architectures
from kvpolicy.cli import output
from kvpolicy.cli.arguments import Json
from kvpolicy.errors import UsageError
from kvpolicy.language import load_policy, shipped_policies
from kvpolicy.language.signals import clash, definition, origin, signal_names
from kvpolicy.models import builtin_models

EPILOG = "Examples: kvpolicy list; kvpolicy list policies --verbose; kvpolicy list --json."


class Kind(StrEnum):
    policies = "policies"
    signals = "signals"
    models = "models"
    architectures = "architectures"


def run(
    kind: Annotated[Kind | None, typer.Argument(help="List only these.", show_default="all")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More about each.")] = False,
    json: Json = False,
) -> None:
    """List what is installed: policies, signals, built-in models, architectures."""
    found = {each.value: FINDERS[each]() for each in ([kind] if kind else Kind)}
    if json:
        output.json_object(found)
        return
    for index, (title, entries) in enumerate(found.items()):
        if index:
            output.data("")
        _show(title, entries, verbose)


def _show(title: str, entries: list[dict[str, Any]], verbose: bool) -> None:
    columns = [key for key in (entries[0] if entries else {}) if verbose or key in ("name", "summary")]
    rows = [[_cell(entry[key]) for key in columns] for entry in entries]
    output.table([title, *columns[1:]], rows)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return escape(", ".join(f"{name}={item}" for name, item in value.items()))
    return escape(", ".join(value) if isinstance(value, list) else str(value))


def policies() -> list[dict[str, Any]]:
    """Shipped policies and those of plug-ins."""
    found = [load_policy(name) for name in shipped_policies()]
    return [
        {
            "name": policy.name,
            "summary": policy.summary,
            "params": {name: str(param.default) for name, param in policy.params.items()},
            "cite": list(policy.cite),
            "tests": len(policy.tests),
        }
        for policy in found
    ]


def signals() -> list[dict[str, Any]]:
    """What a scorer can rank by; one of a plug-in that is broken says so."""
    return [{"name": name, "summary": _meaning(name), "from": origin(name)} for name in signal_names()]


def _meaning(signal: str) -> str:
    try:
        return "; ".join(filter(None, (definition(signal).meaning, clash(signal))))
    except UsageError as error:
        return f"BROKEN: {error}"


def models() -> list[dict[str, Any]]:
    """Models that come with kvpolicy, or that it can fetch by itself."""
    return [{"name": model.name, "summary": model.summary} for model in builtin_models()]


def supported_architectures() -> list[dict[str, Any]]:
    """Model types that a policy can be applied to."""
    return [{"name": name, "summary": entry.covers} for name, entry in sorted(architectures().items())]


FINDERS: dict[Kind, Callable[[], list[dict[str, Any]]]] = {
    Kind.policies: policies,
    Kind.signals: signals,
    Kind.models: models,
    Kind.architectures: supported_architectures,
}
