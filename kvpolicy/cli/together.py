"""The command line in several processes, as torchrun and `accelerate launch` start it: all may work, one speaks."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from kvpolicy.models.processes import processes


@contextmanager
def among_processes(arguments: Sequence[str]) -> Iterator[None]:
    """One run of a command: what is said to it on stdin all processes hear, and the first alone is heard."""
    here = processes()
    if here.count == 1:
        yield
        return
    stdin, met_before = sys.stdin, here.met
    with ExitStack() as stack:
        if not here.first:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        if "-" in arguments:
            sys.stdin = io.StringIO(here.told(stdin.read))
        try:
            yield
        finally:
            sys.stdin = stdin
            if not met_before:  # else it is somebody else's
                here.leave()


def on_first_process(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A verb that one process does, and the others leave to it."""

    @functools.wraps(verb)
    def run(**values: Any) -> Any:
        return verb(**values) if processes().first else None

    return run


@contextmanager
def heard_once(text: str) -> Iterator[bool]:
    """For an error: whether this process is to say it. All that meet the same one say it once, whoever comes first."""
    here = processes()
    says = here.says(text)
    if not says or here.first:
        yield says
        return
    with redirect_stderr(sys.__stderr__):
        yield True
