"""`kvpolicy validate`: is this a policy, and if not, what is wrong and where."""

from __future__ import annotations

import dataclasses
from typing import Any

import typer
from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.cli.arguments import Json, Settings, Specs, parse_settings
from kvpolicy.errors import PolicyError
from kvpolicy.language import Policy, load_policy

EPILOG = (
    "Examples: kvpolicy validate my-policy.yaml; kvpolicy validate raas --set budget=2k. Exit code 3: one is invalid."
)


def run(specs: Specs, settings: Settings = None, json: Json = False) -> None:
    """Check policies without a model, and show every mistake with its place and the way out."""
    values = parse_settings(settings)
    outcomes = {spec: _load(spec, values) for spec in specs}
    invalid = sum(isinstance(outcome, PolicyError) for outcome in outcomes.values())
    if json:
        output.json_object({"valid": not invalid, "specs": [_report(*pair) for pair in outcomes.items()]})
    else:
        for spec, outcome in outcomes.items():
            _show(spec, outcome)
        if len(outcomes) > 1:
            output.note(f"{len(outcomes)} policies: {len(outcomes) - invalid} valid, {invalid} invalid")
    if invalid:
        raise typer.Exit(PolicyError.exit_code)


def _load(spec: str, values: dict[str, str]) -> Policy | PolicyError:
    try:
        return load_policy(spec, set=values)
    except PolicyError as error:
        return error


def _show(spec: str, outcome: Policy | PolicyError) -> None:
    if isinstance(outcome, PolicyError):
        output.error(outcome)
        output.data(f"{escape(spec)}: [red]invalid[/], {_count(max(1, len(outcome.diagnostics)), 'error')}")
        return
    parts = [
        _count(len(outcome.pools), "pool"),
        _count(len(outcome.params), "param"),
        _count(len(outcome.tests), "test"),
    ]
    output.data(f"{escape(spec)}: [green]valid[/], {escape(outcome.name)} with {', '.join(parts)}")


def _report(spec: str, outcome: Policy | PolicyError) -> dict[str, Any]:
    """One policy in the `--json` object."""
    if isinstance(outcome, PolicyError):
        mistakes = [dataclasses.asdict(item) for item in outcome.diagnostics]
        return {"spec": spec, "valid": False, "message": str(outcome), "errors": mistakes}
    return {"spec": spec, "valid": True, "name": outcome.name, "digest": outcome.digest, "errors": []}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
