"""Mutated texts through the loader: each gives a policy or a PolicyError with places, soon and in little memory."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvpolicy.errors import PolicyError
from kvpolicy.language import loads_policy
from kvpolicy.language.library import decode
from kvpolicy.testing.mutated import lines_of, mutate
from kvpolicy.testing.shrinking import Choices
from kvpolicy.testing.strategies.policies import draw_policy

LIMIT = 10.0
"""Seconds that one text may take."""

ROOM = 2**30
"""Bytes that a batch may take beyond what is there before it."""

DRAWN = 60
"""Random policies that are disturbed, beside the shipped ones."""


@dataclass(frozen=True)
class Batch:
    """Texts ``first`` to ``first + count - 1`` of a seed."""

    first: int
    count: int
    seed: int


@dataclass
class Read:
    """What became of texts."""

    texts: int = 0
    loaded: int = 0
    refused: int = 0
    diagnostics: int = 0
    slowest: float = 0.0
    most_bytes: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Read) -> None:
        """Take in what became of others."""
        for name in ("texts", "loaded", "refused", "diagnostics"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.slowest = max(self.slowest, other.slowest)
        self.most_bytes = max(self.most_bytes, other.most_bytes)
        self.failures += other.failures


class Hang(Exception):
    """A text took longer than LIMIT."""


def read_batch(batch: Batch) -> Read:
    """Load a batch; nothing is raised."""
    read, texts = Read(), valid_texts(batch.seed)
    lines = lines_of(texts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with limited():
        for number in range(batch.first, batch.first + batch.count):
            seeded = random.Random(f"{batch.seed}/{number}/text")
            read_one(mutate(seeded.randint, texts, lines), number, batch, read)
    unit = 1 if sys.platform == "darwin" else 1024
    read.most_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    return read


@cache
def valid_texts(seed: int) -> list[bytes]:
    """The shipped policies and some random ones."""
    folder = files("kvpolicy.policies")
    shipped = [part.read_bytes() for part in folder.iterdir() if part.name.endswith(".yaml")]
    drawn = (draw_policy(Choices(random=random.Random(f"{seed}/{number}/valid"))) for number in range(DRAWN))
    return [*sorted(shipped), *(text.encode() for text in drawn if text is not None)]


def read_one(data: bytes, number: int, batch: Batch, read: Read) -> None:
    """Load one text."""
    start = time.monotonic()
    wrong = ""
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        loads_policy(decode(data, "mutated.yaml"), "mutated.yaml")
        read.loaded += 1
    except PolicyError as error:
        read.refused += 1
        read.diagnostics += len(error.diagnostics)
        wrong = misplaced(error)
    except BaseException:
        wrong = traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    read.texts += 1
    read.slowest = max(read.slowest, time.monotonic() - start)
    if wrong:
        where = f"text {number} of python -m kvpolicy.lab.fuzz --cases 0 --seed {batch.seed}\n{wrong}\n{data!r}"
        read.failures.append("".join(f"# {line}\n" for line in where.splitlines()) + data.decode("utf-8", "replace"))


def misplaced(error: PolicyError) -> str:
    """What is wrong with a refusal, if anything: it names at least one place, and shows it."""
    if not error.diagnostics:
        return f"a PolicyError without a place: {error}"
    for item in error.diagnostics:
        if not item.reason or item.line < 1 or item.column < 1 or item.place not in str(error):
            return f"a diagnostic without a place: {item!r}"
    return ""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A text that takes too long is interrupted, and one that takes too much memory fails."""

    def late(*_: Any) -> None:
        raise Hang(f"more than {LIMIT:.0f} seconds")

    previous = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, previous)
