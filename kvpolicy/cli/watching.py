"""Waits for files to change, by looking at them now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.errors import PolicyError
from kvpolicy.language.library import SUFFIXES, is_path, shipped_policies
from kvpolicy.language.reader import read

SECONDS = 0.3
"""Between two looks."""


def watched(references: Sequence[str]) -> Iterator[None]:
    """At once, and after every change of a file; the screen is cleared before, where there is one. Never ends."""
    while True:
        files = list(files_of(references))
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
    """The files of specs and traces, and of the policies that they extend, each once."""
    shipped, found = shipped_policies(), list[Path]()
    waiting = [(reference, Path()) for reference in references]
    while waiting:
        reference, folder = waiting.pop(0)
        by_name = reference in shipped and not is_path(reference)
        file = shipped[reference] if by_name else folder / reference
        if file not in found:
            found.append(file)
            yield file
            waiting += [(parent, file.parent) for parent in parents(file)]


def parents(file: Path) -> Iterator[str]:
    """What a policy's file extends, as written there; nothing where it is none, or broken."""
    if file.suffix not in SUFFIXES:
        return
    try:
        content = read(file.read_text(encoding="utf-8"), str(file)).content
    except (OSError, UnicodeDecodeError, PolicyError):
        return
    if isinstance(content, dict) and "extends" in content and isinstance(content["extends"].content, str):
        yield content["extends"].content


def stamp(file: Path) -> tuple[int, int] | None:
    """What changes when a file is written; None while it is not there, as for a moment when an editor replaces it."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
