"""Waits for files to change, by looking at them now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.language.library import is_path, shipped_policies

SECONDS = 0.3
"""Between two looks."""


def watched(references: Sequence[str]) -> Iterator[None]:
    """At once, and after every change of a file; the screen is cleared before, where there is one. Never ends."""
    files = list(files_of(references))
    while True:
        before = [stamp(file) for file in files]
        console = output.stdout()
        if console.is_terminal:
            console.clear()
        yield
        names = ", ".join(escape(str(file)) for file in files)
        output.note(f"[dim]{time.strftime('%H:%M:%S')}  waiting for a change of {names}; Ctrl-C ends[/]")
        while [stamp(file) for file in files] == before:
            time.sleep(SECONDS)


def files_of(references: Sequence[str]) -> Iterator[Path]:
    """The files of specs and traces, each once."""
    shipped = shipped_policies()
    for reference in dict.fromkeys(references):
        yield shipped[reference] if reference in shipped and not is_path(reference) else Path(reference)


def stamp(file: Path) -> tuple[int, int] | None:
    """What changes when a file is written; None while it is not there, as for a moment when an editor replaces it."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
