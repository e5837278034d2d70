"""Chunks of cases: draws of Hypothesis from one seed, each agreed upon, or shrunk to a file that shows why not."""

from __future__ import annotations

import hashlib
import random
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from kvpolicy.lab.fuzz.coverage import features
from kvpolicy.testing.search import agree, reproduction
from kvpolicy.testing.strategies import policies, texts

EXAMPLES = 5
"""Near ties of a chunk that are kept in words."""


@dataclass(frozen=True)
class Chunk:
    """Which cases: ``count`` draws from the seed (``seed``, ``number``); ``supported`` or from the whole language.

    ``compiled``: one of them goes through torch.compile as well.
    """

    number: int
    count: int
    seed: int
    supported: bool = True
    compiled: bool = False

    @property
    def own_seed(self) -> int:
        """The seed that Hypothesis gets."""
        told = f"{self.seed}/{self.number}/{self.supported}"
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:4], "big")


@dataclass
class Found:
    """What became of chunks of cases."""

    agreed: int = 0
    evicting: int = 0
    compared: int = 0
    evicted: int = 0
    compiled: int = 0
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
    found, broken = Found(), list[str]()
    worth_compiling: list[tuple[str, dict[str, Any]]] = []

    @seed(chunk.own_seed)
    @settings(
        max_examples=chunk.count,
        phases=[Phase.generate, Phase.shrink],
        database=None,
        deadline=None,
        derandomize=False,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(policies(supported=chunk.supported), texts())
    def case(policy: str, text: dict[str, Any]) -> None:
        try:
            outcome = agree(policy, text)
        except Exception:
            broken.append(reproduction(policy, text, told(chunk, traceback.format_exc(limit=-3))))
            raise
        if broken:  # only shrinking follows
            return
        found.drawn.update(features(policy, text))
        found.distinct.add(hash_of(policy, text))
        found.refused.update(outcome.refused)
        found.agreed += not outcome.refused
        found.evicting += outcome.evicted > 0
        found.compared += outcome.compared
        found.evicted += outcome.evicted
        found.near_ties += len(outcome.near_ties)
        found.ties += outcome.near_ties[: max(0, EXAMPLES - len(found.ties))]
        if outcome.evicted and len(worth_compiling) < chunk.count:
            worth_compiling.append((policy, text))

    try:
        case()
    except Exception:
        found.failures.append(broken[-1] if broken else told(chunk, traceback.format_exc()))
    if chunk.compiled and worth_compiling and not broken:
        compile_one(chunk, found, *random.Random(chunk.own_seed).choice(worth_compiling))
    return found


def compile_one(chunk: Chunk, found: Found, policy: str, text: dict[str, Any]) -> None:
    """A case that agreed when run eagerly, again with its generated passes compiled."""
    import torch

    torch._dynamo.reset()
    try:
        agree(policy, text, compiled=True)
        found.compiled += 1
    except Exception:
        why = told(chunk, "compiled only (kvpolicy test --compiled)\n" + traceback.format_exc(limit=-3))
        found.failures.append(reproduction(policy, text, why))


def told(chunk: Chunk, why: str) -> str:
    """Where a counter-example comes from, and what went wrong."""
    kind = "" if chunk.supported else ", whole language"
    return f"found by kvpolicy.lab.fuzz --seed {chunk.seed}, chunk {chunk.number} of {chunk.count} cases{kind}\n{why}"


def hash_of(policy: str, text: dict[str, Any]) -> int:
    return int.from_bytes(hashlib.blake2b(f"{policy}\n{text}".encode(), digest_size=8).digest(), "big")
