"""The `kvpolicy` command: its verbs, its exit codes, and how errors leave it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

import kvpolicy
from kvpolicy.cli import output
from kvpolicy.cli.arguments import with_display_options
from kvpolicy.cli.together import among_processes, on_first_process
from kvpolicy.errors import KvpolicyError

VERBS = (  # a verb is kvpolicy/cli/<verb>.py with a function `run`, imported when the verb is used or listed
    "apply",
    "explain",
    "validate",
    "simulate",
    "bench",
    "eval",
    "compare",
    "test",
    "new",
    "trace",
    "analyze",
    "tune",
    "list",
    "schema",
    "env",
)

_SETTINGS = {"help_option_names": ["-h", "--help"]}

_EPILOG = (
    "Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 a check failed, 2 usage, 3 invalid policy, "
    "4 unknown or unsupported model, 5 extra not installed, 70 bug, 130 interrupted.\n\n"
    "A policy is a YAML file, the name of a shipped one (see kvpolicy list policies), or - for stdin."
)


class _Verbs(Mapping[str, Any]):
    """Commands by name, each built from its file when it is first asked for."""

    def __getitem__(self, name: str) -> Any:
        if name not in VERBS:
            raise KeyError(name)
        return command_of(name)

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


@cache
def command_of(verb: str) -> Any:
    """The command of a verb, as typer builds it."""
    module = import_module(f"kvpolicy.cli.{verb}")
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    run = module.run if getattr(module, "TOGETHER", False) else on_first_process(module.run)
    app.command(verb, epilog=module.EPILOG, context_settings=_SETTINGS)(with_display_options(run))
    return typer.main.get_command(app)


class _Group(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = cast(Any, _Verbs())

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"kvpolicy {kvpolicy.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """KV-cache policies in YAML, run under stock Hugging Face models."""


def _command() -> Any:
    app = typer.Typer(cls=_Group, rich_markup_mode="rich", context_settings=_SETTINGS, no_args_is_help=True)
    app.callback(epilog=_EPILOG)(with_display_options(_root))
    return typer.main.get_command(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    with output.session(), among_processes(sys.argv[1:] if argv is None else argv):
        try:
            code = _run(argv)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read us is gone (`kvpolicy list | head`); Python would complain once more when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        _command().main(args=argv, prog_name="kvpolicy")
    except SystemExit as leave:  # how typer ends, whether a verb was done, help was shown, or usage was wrong
        return leave.code if isinstance(leave.code, int) else 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except KvpolicyError as fault:
        output.error(fault)
        return fault.exit_code
    except Exception as fault:
        output.bug(fault)
        return output.BUG
    return 0
