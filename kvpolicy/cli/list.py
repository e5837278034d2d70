"""`kvpolicy list`: the policies, signals, families of models, built-in models and tasks, read off the installation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.markup import escape

from kvpolicy.architecture import families as shipped_families
from kvpolicy.cli import families, methods, output
from kvpolicy.cli.arguments import Json
from kvpolicy.cli.page import wrapped
from kvpolicy.cli.words import listed
from kvpolicy.errors import UsageError
from kvpolicy.language import load_policy, shipped_policies
from kvpolicy.language.signals import clash, definition, origin, signal_names
from kvpolicy.models import builtin_models

EPILOG = "Examples: kvpolicy list; kvpolicy list policies --verbose; kvpolicy list models; kvpolicy list --json."


class Kind(StrEnum):
    policies = "policies"
    signals = "signals"
    models = "models"
    builtins = "builtins"
    tasks = "tasks"


def run(
    kind: Annotated[Kind | None, typer.Argument(help="List only these.", show_default="all")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More about each.")] = False,
    json: Json = False,
) -> None:
    """List what is installed: policies, signals, the families of models that can be patched, built-in models, tasks."""
    more = verbose or json or kind == Kind.models
    found = {each.value: FINDERS[each](more) for each in ([kind] if kind else Kind)}
    if json:
        output.json_object(found)
        return
    for index, (title, entries) in enumerate(found.items()):
        if index:
            output.data("")
        if verbose and title == Kind.policies:
            _describe(entries)
        elif more and title == Kind.models:
            _matrix(entries)
        else:
            _show(title, entries, verbose)


def _describe(entries: list[dict[str, Any]]) -> None:
    """Policies one after the other: more than a row of a table holds."""
    output.data(f"[bold]policies[/]  laws: {methods.NOTATION}; tokens of a layer, per row and KV head")
    for entry in entries:
        output.data("")
        output.data(f"[bold]{escape(entry['name'])}[/]  {escape(', '.join(entry['cite']))}".rstrip())
        for line in wrapped(entry["summary"], "  "):
            output.data(line)
        for title, told in _lines(entry):
            for line in wrapped(told, f"  {title:<9} "):
                output.data(line)


def _lines(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "params", ", ".join(f"{name}={value}" for name, value in entry["params"].items()) or "none"
    yield "pools", "; ".join(_pool_words(pool) for pool in entry["pools"])
    yield "memory", entry["memory"]
    yield "time", f"{entry['time']} (tokens read in a generated step)"
    told = [f"{signal['name']} (reads {listed(signal['reads'] or ['nothing'])})" for signal in entry["signals"]]
    yield "signals", ", ".join(told) or "none"
    yield "backends", "; ".join(f"{name}: {where}" for name, where in entry["backends"].items())
    yield "tests", str(entry["tests"])


def _pool_words(pool: dict[str, Any]) -> str:
    """`generated: at most max(32, 1024 - size(prompt)), in pages of 16: O(B)`."""
    stays = f"at most {pool['budget']}" if pool["budget"] else "all"
    pages = f", in pages of {pool['page']}" if pool["page"] > 1 else ""
    bits = f", in {pool['bits']} bits" if pool["bits"] else ""
    reads = f", reads {pool['reads']}" if pool["reads"] != "all" else ""
    return f"{pool['name']} {pool['memory']}, {stays}{pages}{bits}{reads}"


def _matrix(entries: list[dict[str, Any]]) -> None:
    """Families by their layers, as transformers' default configs have them, and where they were tested."""
    output.table(families.COLUMNS, [[escape(cell) for cell in families.row(entry)] for entry in entries])


def _show(title: str, entries: list[dict[str, Any]], verbose: bool) -> None:
    columns = [key for key in (entries[0] if entries else {}) if verbose or key in ("name", "summary")]
    rows = [[_cell(entry[key]) for key in columns] for entry in entries]
    output.table([title, *columns[1:]], rows)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return escape(", ".join(f"{name}={item}" for name, item in value.items()))
    return escape(", ".join(value) if isinstance(value, list) else str(value))


def policies(more: bool) -> list[dict[str, Any]]:
    """Shipped policies; ``more`` plans each, and asks the backends, which imports torch."""
    if more:
        return [methods.facts(name) | {"backends": methods.backends(name)} for name in shipped_policies()]
    found = [load_policy(name) for name in shipped_policies()]
    return [{"name": policy.name, "summary": policy.summary} for policy in found]


def signals(more: bool) -> list[dict[str, Any]]:
    """What a scorer can rank by; one of a plug-in that is broken says so."""
    return [{"name": name, "summary": _meaning(name), "from": origin(name)} for name in signal_names()]


def _meaning(signal: str) -> str:
    try:
        return "; ".join(filter(None, (definition(signal).meaning, clash(signal))))
    except UsageError as error:
        return f"BROKEN: {error}"


def models(more: bool) -> list[dict[str, Any]]:
    """Families of models that a policy can be applied to; ``more`` asks transformers for their layers."""
    if more:
        return families.rows()
    return [{"name": name, "summary": entry.covers} for name, entry in sorted(shipped_families().items())]


def builtins(more: bool) -> list[dict[str, Any]]:
    """Models that come with kvpolicy, or that it can fetch by itself."""
    return [{"name": model.name, "summary": model.summary} for model in builtin_models()]


def tasks(more: bool) -> list[dict[str, Any]]:
    """Tasks that `kvpolicy compare` can give a model."""
    from kvpolicy.lab.tasks.registry import tasks

    return [{"name": name, "summary": task.summary, "words": task.size} for name, task in tasks().items()]


FINDERS: dict[Kind, Callable[[bool], list[dict[str, Any]]]] = {
    Kind.policies: policies,
    Kind.signals: signals,
    Kind.models: models,
    Kind.builtins: builtins,
    Kind.tasks: tasks,
}
