"""The command line as Markdown: every verb with its arguments, options and examples, read off the commands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvpolicy.cli.main import VERBS, command_of

SHARED = {"color", "quiet", "help"}
"""Parameters that every verb takes: named once, above the verbs."""


def render_verbs() -> str:
    """The generated part of docs/cli.md."""
    return "\n\n".join("\n\n".join(_verb(verb)) for verb in VERBS)


def render_commands() -> str:
    """A table of all verbs, a line each."""
    rows = (f"| `{_usage(verb)}` | {' '.join(command_of(verb).help.split())} |" for verb in VERBS)
    return "\n".join(["| command | what it does |", "| --- | --- |", *rows])


def _usage(verb: str) -> str:
    arguments = (_metavar(each) for each in command_of(verb).params if each.param_type_name == "argument")
    return " ".join(["kvpolicy", verb, *arguments])


def _verb(verb: str) -> Iterator[str]:
    command = command_of(verb)
    parameters = [each for each in command.params if each.name not in SHARED]
    yield f"## kvpolicy {verb}"
    yield f"`{_usage(verb)} [options]`"
    yield " ".join(command.help.split())
    rows = [_row(each) for each in parameters if each.help]
    if rows:
        yield "\n".join(["| parameter | meaning | default |", "| --- | --- | --- |", *rows])
    before, _, examples = command.epilog.partition(": ")
    lines = [example.strip() for example in examples.split(";")]
    yield f"{before}: {'; '.join(lines)}"


def _row(parameter: Any) -> str:
    name = _metavar(parameter)
    if parameter.param_type_name == "option":
        name = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return f"| `{name}` | {parameter.help} | {_default(parameter)} |".replace("|  |", "| |")


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _default(parameter: Any) -> str:
    value = parameter.default
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return f"`{value}`" if plain else ""
