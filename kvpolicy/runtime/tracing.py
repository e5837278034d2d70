"""While torch traces a step, nobody else runs one.

Tracing is no private matter: torch replaces methods of every ``nn.Module`` and sets flags that guards and model code
look at, for all threads. A layer that another thread runs meanwhile may then fail its guards, or trace what it should
not. So layers of patched models run side by side, and a trace waits for those under way and keeps the others waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Tracing:
    """Many may ``run``, or one may ``trace``. A trace that waits lets nobody by; inside a run nobody may run again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = self._waiting = 0
        self._tracing = False

    @contextmanager
    def run(self) -> Iterator[None]:
        """Run what was compiled, or an eager layer."""
        with self._changed:
            while self._tracing or self._waiting:
                self._changed.wait()
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def trace(self, *, inside: bool = False) -> Iterator[None]:
        """Compile, alone; ``inside`` a run of one's own, which then stands still meanwhile."""
        with self._changed:
            self._waiting += 1
            self._running -= inside
            self._changed.notify_all()
            try:
                while self._tracing or self._running:
                    self._changed.wait()
                self._tracing = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._tracing = False
                self._running += inside
                self._changed.notify_all()


TRACING = Tracing()
"""The process's own: torch's state is."""
