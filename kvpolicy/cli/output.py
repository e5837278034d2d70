"""Where a verb's words go: data to stdout, everything else to stderr, in colour only where a person reads it."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table
from rich.text import Text

from kvpolicy.cli.together import heard_once
from kvpolicy.errors import Diagnostic, KvpolicyError, PolicyError, UsageError

SCHEMA_VERSION = 1
"""Version of the objects that `--json` prints; it grows when a key changes its meaning or goes away."""

BUG = 70
"""Exit code of a fault in kvpolicy itself (EX_SOFTWARE), apart from all codes that speak about the user's input."""


class Color(StrEnum):
    auto = "auto"
    always = "always"
    never = "never"


@dataclass
class Display:
    """What the display options of the command line ask for."""

    color: Color = Color.auto
    quiet: bool = False


_display = Display()


@contextmanager
def session() -> Iterator[None]:
    """One run of the command line: default display options, and the environment given back afterwards."""
    global _display
    _display = Display()
    saved = {name: os.environ.get(name) for name in ("NO_COLOR", "FORCE_COLOR")}
    try:
        yield
    finally:
        for name, value in saved.items():
            _set_environment(name, value)


def configure(color: Color | None = None, quiet: bool = False) -> None:
    """Apply display options. None and False leave what an earlier call set: options count before and after the verb."""
    _display.quiet |= quiet
    if color is None:
        return
    _display.color = color
    # The help and usage errors that typer prints, and progress bars of libraries, only listen to the environment.
    _set_environment("NO_COLOR", "1" if color is Color.never else None)
    _set_environment("FORCE_COLOR", "1" if color is Color.always else None)


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def stdout() -> Console:
    """Console for data. Without a terminal it neither wraps nor cuts lines."""
    return _console(sys.stdout)


def stderr() -> Console:
    """Console for everything that is not data."""
    return _console(sys.stderr)


def _console(file: Any) -> Console:
    terminal = file.isatty()
    plain = _display.color is Color.never
    return Console(
        file=file,
        highlight=False,
        width=None if terminal else 100_000,
        force_terminal=False if plain else None,
        color_system=None if plain else "auto",
    )


def is_quiet() -> bool:
    """Whether the user asked for results and errors only."""
    return _display.quiet


def data(*renderables: Any) -> None:
    """Print results to stdout: text with rich markup (escape what is not yours), tables, panels."""
    stdout().print(*renderables, soft_wrap=not any(isinstance(item, Table) for item in renderables))


def note(text: str) -> None:
    """Print a remark to stderr, unless `--quiet`; `text` is rich markup."""
    if not _display.quiet:
        stderr().print(text, soft_wrap=True)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on stderr while something takes time; nothing where nobody looks."""
    console = stderr()
    if not console.is_terminal or _display.quiet:
        yield
        return
    with Status(f"{escape(what)} …", console=console):
        yield


def json_object(payload: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout, `schema_version` first."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **payload}, indent=2, ensure_ascii=False, default=str))


def write_file(path: Path, text: str) -> None:
    """Write a text to a file that the user named. Raises UsageError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as fault:
        raise UsageError(f"cannot write {path}: {fault.strerror}; give a path in a folder that exists") from fault


def write_bytes(path: Path, content: bytes) -> None:
    """Write a picture to a file that the user named. Raises UsageError."""
    try:
        path.write_bytes(content)
    except OSError as fault:
        raise UsageError(f"cannot write {path}: {fault.strerror}; give a path in a folder that exists") from fault


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Print rows of rich markup to stdout: ruled and fitted on a terminal, aligned and never cut elsewhere."""
    console = stdout()
    ruled = box.SIMPLE_HEAD if console.is_terminal else None
    grid = Table(title=title, title_justify="left", title_style="bold", pad_edge=False, box=ruled)
    for index, column in enumerate(columns):
        grid.add_column(column, no_wrap=index == 0, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def diagnostic(item: Diagnostic) -> Text:
    """A mistake in a policy as `str()` gives it, with the place, the underline and the way out coloured."""
    text = Text(str(item))
    text.highlight_regex(r"\A[^\n]*?(?=: )", "bold")
    text.highlight_regex(r"(?m)^ *\| *\^+$", "red")
    text.highlight_regex(r"(?m)^ +\d+ \|", "dim")
    text.highlight_regex(r"(?m)^ *= .*$", "green")
    return text


def error(fault: KvpolicyError) -> None:
    """Print an error that is the user's to mend: one message, all of a policy's mistakes, never a traceback."""
    with heard_once(str(fault)) as heard:
        if not heard:
            return
        console = stderr()
        _traceback_if_debugging(fault)
        if isinstance(fault, PolicyError) and fault.diagnostics:
            for item in fault.diagnostics:
                console.print(diagnostic(item), soft_wrap=True)
        else:
            console.print(f"[bold red]error:[/] {escape(str(fault))}", soft_wrap=True)


def bug(fault: Exception) -> None:
    """Print a fault that is ours to mend: where it happened, and what a report should hold."""
    with heard_once(str(fault)) as heard:
        if heard:
            _report(fault)


def _report(fault: Exception) -> None:
    _traceback_if_debugging(fault)
    where = ""
    if frames := traceback.extract_tb(fault.__traceback__):
        where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    reason = traceback.format_exception_only(fault)[-1].strip()
    lines = [f"[bold red]bug in kvpolicy:[/] {escape(reason)}{where}"]
    lines += ["Please report it, with the command you ran and the output of `kvpolicy env`."]
    if not _debugging():
        lines += ["KVPOLICY_DEBUG=1 shows the full traceback."]
    stderr().print("\n".join(lines), soft_wrap=True)


def _debugging() -> bool:
    return os.environ.get("KVPOLICY_DEBUG", "") not in ("", "0")


def _traceback_if_debugging(fault: Exception) -> None:
    if _debugging():
        traceback.print_exception(fault)
