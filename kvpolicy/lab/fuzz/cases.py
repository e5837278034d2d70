"""Cases by number: each drawn from its own seed, agreed upon, or shrunk to a file that shows why not."""

from __future__ import annotations

import hashlib
import random
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kvpolicy.lab.fuzz.coverage import features
from kvpolicy.testing.search import agree, reproduction
from kvpolicy.testing.shrinking import Choices, shrink
from kvpolicy.testing.strategies.policies import draw_policy
from kvpolicy.testing.strategies.texts import draw_text

EXAMPLES = 5
"""Near ties of a chunk that are kept in words."""


@dataclass(frozen=True)
class Chunk:
    """Cases ``first`` to ``first + count - 1`` of a seed; ``supported``: drawn from what the runtime runs, or from the
    whole language. Case number n is compiled as well where n is a multiple of ``compile_every`` (0: none is)."""

    first: int
    count: int
    seed: int
    supported: bool = True
    compile_every: int = 0


@dataclass
class Found:
    """What became of cases. ``wasted`` draws were no valid policy and were drawn again."""

    agreed: int = 0
    evicting: int = 0
    compared: int = 0
    evicted: int = 0
    compiled: int = 0
    wasted: int = 0
    near_ties: int = 0
    ties: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    drawn: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    distinct: set[int] = field(default_factory=set)

    def add(self, other: Found) -> None:
        """Take in what became of others."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                mine.update(value)
            elif isinstance(mine, list):
                mine += value
            elif isinstance(mine, set):
                mine |= value
            else:
                setattr(self, name, mine + value)


def search(chunk: Chunk) -> Found:
    """Run a chunk. Nothing is raised: a counter-example is a failure in words, shrunk."""
    found = Found()
    for number in range(chunk.first, chunk.first + chunk.count):
        one_case(chunk, number, found)
    return found


def drawn(choices: Choices, supported: bool) -> tuple[str, dict[str, Any]] | None:
    """A policy and a text; None where no valid policy was drawn."""
    policy = draw_policy(choices, supported=supported)
    return None if policy is None else (policy, draw_text(choices))


def one_case(chunk: Chunk, number: int, found: Found) -> None:
    """Draw case ``number``, run it, and note what became of it."""
    seeded = random.Random(f"{chunk.seed}/{number}/{chunk.supported}")
    choices = Choices(random=seeded)
    while (case := drawn(choices, chunk.supported)) is None:
        found.wasted += 1
        choices = Choices(random=seeded)
    policy, text = case
    found.drawn.update(features(policy, text))
    found.distinct.add(int.from_bytes(hashlib.blake2b(repr(case).encode(), digest_size=8).digest(), "big"))
    try:
        outcome = agree(policy, text)
    except Exception:
        found.failures.append(shrunk(chunk, number, choices.taken))
        return
    found.refused.update(outcome.refused)
    found.agreed += not outcome.refused
    found.evicting += outcome.evicted > 0
    found.compared += outcome.compared
    found.evicted += outcome.evicted
    found.near_ties += len(outcome.near_ties)
    found.ties += outcome.near_ties[: max(0, EXAMPLES - len(found.ties))]
    if chunk.compile_every and number % chunk.compile_every == 0 and not outcome.refused:
        compile_one(chunk, number, found, policy, text)


def compile_one(chunk: Chunk, number: int, found: Found, policy: str, text: dict[str, Any]) -> None:
    """A case that agreed when run eagerly, again with its generated passes compiled."""
    import torch

    torch._dynamo.reset()
    try:
        agree(policy, text, compiled=True)
        found.compiled += 1
    except Exception:
        why = told(chunk, number, "compiled only: kvpolicy test --compiled\n" + traceback.format_exc(limit=-3))
        found.failures.append(reproduction(policy, text, why))


def shrunk(chunk: Chunk, number: int, taken: list[int]) -> str:
    """The simplest counter-example found from these choices, as a file; any failure will do while it gets simpler."""
    latest = ""

    def fails(choices: Choices) -> bool:
        nonlocal latest
        case = drawn(choices, chunk.supported)
        if case is None:
            return False
        try:
            agree(*case)
        except Exception:
            latest = reproduction(*case, told(chunk, number, traceback.format_exc(limit=-3)))
            return True
        return False

    fails(Choices(shrink(taken, fails)))
    return latest


def told(chunk: Chunk, number: int, why: str) -> str:
    """Where a counter-example comes from, and what went wrong."""
    whole = "" if chunk.supported else " --whole"
    return f"found by: python -m kvpolicy.lab.fuzz --seed {chunk.seed} --case {number}{whole}\n{why}"
