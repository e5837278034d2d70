"""Plants tokens of every class in synthetic attention and looks for them: is the classifier to be believed?

``python -m kvpolicy.lab.analyze.planted`` prints precision and recall of every class.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvpolicy.lab.analyze.classes import sort
from kvpolicy.lab.analyze.rules import JUDGED, Kind, Rules
from kvpolicy.lab.analyze.stream import Stream, rows_of
from kvpolicy.testing.patterns import synthesize

Array = np.ndarray

WANTED = 0.95
"""Precision and recall of every class."""

SINKS = 4
MARGIN = 4
"""Queries by which what is planted keeps clear of a threshold: nobody is asked to tell 64 from 63."""

HEADS = ("sinks alone", "local", "drifting", "milestones", "phoenixes", "heavy hitters", "bursts", "all of them")
"""What is planted in each head."""


@dataclass
class Garden:
    """What is planted in a text: parts of a mixture, and the true classes [H, T]."""

    prompt: int
    length: int
    rules: Rules
    random: np.random.Generator
    parts: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.truth = np.full((len(HEADS), self.length), Kind.LAZY, dtype=np.int8)
        self.truth[:, max(0, self.length - self.rules.local - self.rules.silence + 1) :] = Kind.UNJUDGED
        self.taken: dict[int, set[int]] = {head: set() for head in range(len(HEADS))}

    def plant(self, head: int, pattern: str, kind: Kind, tokens: Sequence[int], **arguments: Any) -> None:
        """Tokens of a class in a head."""
        self.parts.append({"pattern": pattern, **arguments, "where": {"heads": [head]}})
        judged = [token for token in tokens if self.truth[head, token] != Kind.UNJUDGED]
        self.truth[head, judged] = kind

    def places(self, head: int, count: int, last: int) -> Iterator[int]:
        """So many free tokens of a head, from the first that is no sink to ``last``."""
        free = [token for token in range(self.rules.first, last + 1) if token not in self.taken[head]]
        for token in self.random.choice(free, count, replace=False).tolist():
            self.taken[head].add(token)
            yield token

    def level(self) -> float:
        """How much a planted token stands out: the logarithm of 55 to 400 times an ordinary token's weight."""
        return float(self.random.uniform(4, 6))

    def seen(self, token: int) -> int:
        """The first query that may look at a token."""
        return max(token + self.rules.local, self.rules.begin)


def planted(seed: int, length: int, rules: Rules, noise: float = 0.25, prompt: float = 0.4) -> tuple[Any, Array]:
    """Synthetic attention of a text, and the true class of every token [H, T]."""
    garden = Garden(round(prompt * length), length, rules, np.random.default_rng([seed, length]))
    few = max(2, length // 200)
    for head in range(len(HEADS)):
        if HEADS[head] not in ("local", "drifting"):
            level = 7.0 if HEADS[head] == "sinks alone" else 5.0
            garden.plant(head, "sink", Kind.SINK, range(SINKS), sinks=SINKS, level=level, fade=1.0)
    _plant_local(garden)
    for head, sow in ((3, _milestones), (4, _phoenixes), (5, _heavy_hitters), (6, _bursts)):
        sow(garden, head, 2 * few)
        sow(garden, HEADS.index("all of them"), few)
    said = synthesize(
        {
            "pattern": "mixture", "parts": garden.parts, "prompt": garden.prompt, "steps": length - garden.prompt,
            "layers": 1, "heads": len(HEADS), "kv_heads": len(HEADS), "seed": seed, "noise": noise,
        }
    )  # fmt: skip
    return said, garden.truth


def _plant_local(garden: Garden) -> None:
    """A head in which every token is local, and one in which the important region moves."""
    head = HEADS.index("local")
    garden.plant(head, "local", Kind.LOCAL, range(garden.length), width=garden.rules.local / 4)
    head, width, every = HEADS.index("drifting"), 4, garden.rules.local - 8
    at = [
        token for start in range(0, garden.length, every) for token in range(start, min(start + width, garden.length))
    ]
    garden.plant(head, "drift", Kind.LOCAL, at, every=every, width=width, level=6.0, fade=0.0)


def _milestones(garden: Garden, head: int, count: int) -> None:
    last = garden.length - garden.rules.silence - MARGIN
    for token in garden.places(head, count, last - garden.rules.local - 2 * MARGIN):
        until = int(garden.random.integers(garden.seen(token) + MARGIN + 8 * count, last + 8 * count))
        garden.plant(
            head, "milestone", Kind.MILESTONE, [token], at=token, until=min(until, last), level=garden.level(), fade=0.0
        )


def _phoenixes(garden: Garden, head: int, count: int) -> None:
    needed = garden.rules.silence + 2 * MARGIN
    for token in garden.places(head, count, garden.length - garden.rules.local - needed - 1):
        begin = int(garden.random.integers(garden.seen(token) + needed - MARGIN, garden.length - MARGIN))
        garden.plant(
            head, "phoenix", Kind.PHOENIX, [token], at=token, level=garden.level(), fade=0.0, **{"from": begin}
        )


def _heavy_hitters(garden: Garden, head: int, count: int) -> None:
    for token in garden.places(head, count, garden.length - garden.rules.local - garden.rules.silence):
        garden.plant(head, "heavy-hitter", Kind.HEAVY_HITTER, [token], at=token, level=garden.level(), fade=0.0)


def _bursts(garden: Garden, head: int, count: int) -> None:
    rules = garden.rules
    for token in garden.places(head, count, garden.length - rules.begin - rules.silence - 10 * MARGIN):
        least = garden.seen(token) - token + rules.silence + MARGIN
        every = int(garden.random.integers(least, least + 5 * MARGIN))
        garden.plant(
            head, "burst", Kind.PHOENIX, [token], at=token, every=every, width=2, level=garden.level(), fade=0.0
        )


def found(seed: int, length: int, rules: Rules, noise: float = 0.25) -> tuple[Array, Array]:
    """The true classes and those that the classifier gives [H, T] each."""
    said, truth = planted(seed, length, rules, noise)
    stream = Stream(len(HEADS), rules)
    query, key = (torch.from_numpy(np.asarray(numbers[0][0])) for numbers in (said.queries, said.keys))
    for begin in range(0, length, 100):  # as a model that reads its prompt in pieces would tell it
        end = min(length, begin + 100)
        for rows in rows_of(query[:, begin:end], key[:, :end], said.scale):
            stream.see(rows)
    return truth, sort(stream.notes(), rules).kind


def confusion(pairs: Sequence[tuple[Array, Array]]) -> Array:
    """[true class, class found] counts of tokens."""
    table = np.zeros((len(Kind), len(Kind)), dtype=int)
    for truth, kind in pairs:
        np.add.at(table, (truth.astype(int), kind.astype(int)), 1)
    return table


def precision_and_recall(table: Array) -> dict[Kind, tuple[float, float]]:
    """Of every class that is judged. A class of which nothing was found has precision 0."""
    hits = np.diag(table)
    return {
        kind: (float(hits[kind] / max(1, table[:, kind].sum())), float(hits[kind] / max(1, table[kind].sum())))
        for kind in JUDGED
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns 1 where a class is below ``WANTED``."""
    parser = argparse.ArgumentParser(prog="python -m kvpolicy.lab.analyze.planted", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many texts of each length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[400, 800, 1600])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.25, 0.5])
    asked = parser.parse_args(argv)
    below = False
    for length in asked.lengths:
        for noise in asked.noise:
            table = confusion([found(seed, length, Rules(), noise) for seed in range(asked.seeds)])
            scores = precision_and_recall(table)
            print(f"\n{asked.seeds} texts of {length} tokens, noise {noise:g}, {len(HEADS)} heads each")
            print(f"  {'class':<13} {'planted':>8} {'found':>8} {'precision':>10} {'recall':>8}")
            for kind, (precision, recall) in scores.items():
                planted_count, found_count = table[kind].sum(), table[:, kind].sum()
                print(f"  {kind.word:<13} {planted_count:>8,} {found_count:>8,} {precision:>10.4f} {recall:>8.4f}")
                below |= min(precision, recall) < WANTED
    print(f"\n{'BELOW' if below else 'every class is above'} {WANTED}")
    return int(below)


if __name__ == "__main__":
    sys.exit(main())
