"""What blocks of places say together: means over texts with intervals, and curves by place. NumPy alone.

An interval comes from resampling texts, and within a text its blocks of places: places that lie together are alike, so
single places would make it too narrow, and the texts of one file are a sample as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

REPEATS = 1000
LEVEL = 0.95
AT_ONCE = 2**20  # blocks drawn at once: one resampling after the other took minutes for a page, all of them gigabytes


@dataclass(frozen=True)
class Estimate:
    """A mean over places, and the interval that holds it in 95 % of all resamplings."""

    value: float
    low: float
    high: float

    def mapped(self, rising: Any) -> Estimate:
        """The same of a rising function."""
        return Estimate(rising(self.value), rising(self.low), rising(self.high))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Blocks:
    """The blocks of all texts under one arm: ``count`` [N, C] places, 0 behind a text's last block, and by measure
    their ``sums`` [N, C]. ``size`` places make a full block."""

    count: np.ndarray
    sums: Mapping[str, np.ndarray]
    size: int

    @classmethod
    def of(cls, counts: Sequence[Sequence[int]], sums: Sequence[Mapping[str, Sequence[float]]], size: int) -> Blocks:
        """By text, places and sums of each block."""
        most = max(map(len, counts))

        def square(rows: Sequence[Sequence[float]]) -> np.ndarray:
            return np.array([[*row, *[0.0] * (most - len(row))] for row in rows], dtype=np.float64)

        return cls(square(counts), {name: square([each[name] for each in sums]) for name in sums[0]}, size)

    def part(self, start: int, stop: int) -> Blocks:
        """The blocks [start, stop) of every text that reaches so far."""
        there = self.count[:, start] > 0
        sums = {name: values[there, start:stop] for name, values in self.sums.items()}
        return Blocks(self.count[there, start:stop], sums, self.size)


def estimate(blocks: Blocks, measure: str, *, seed: int = 0) -> Estimate:
    """The mean of a measure over all places, with its interval; equal arguments give equal numbers.

    Raises:
        ValueError: there is no place.
    """
    count, total = blocks.count, blocks.sums[measure]
    if not count.sum():
        raise ValueError("there are no places to take a mean of")
    rng = np.random.default_rng(seed)
    each = max(1, AT_ONCE // count.size)
    parts = [_resampled(count, total, min(each, REPEATS - done), rng) for done in range(0, REPEATS, each)]
    low, high = np.quantile(np.concatenate(parts), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = total.sum() / count.sum()
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def _resampled(count: np.ndarray, total: np.ndarray, repeats: int, rng: np.random.Generator) -> np.ndarray:
    """Means [repeats] over texts drawn anew, each with as many of its own blocks as it has, drawn anew as well."""
    texts, blocks = count.shape
    rows = rng.integers(texts, size=(repeats, texts, 1))
    length = (count > 0).sum(1)[rows]
    chosen = rows * blocks + (rng.random((repeats, texts, blocks)) * length).astype(int)
    there = np.arange(blocks) < length
    sums = [np.where(there, values.ravel()[chosen], 0).sum((1, 2)) for values in (total, count)]
    return sums[0] / sums[1]


def curve(blocks: Blocks, measure: str, *, points: int = 10, seed: int = 0) -> list[tuple[int, int, Estimate]]:
    """(first place, last place + 1, mean) along the output in ``points`` equal parts, of the texts that reach there."""
    return [(*place, estimate(part, measure, seed=seed)) for place, part in _parts(blocks, points)]


def _parts(blocks: Blocks, points: int) -> list[tuple[tuple[int, int], Blocks]]:
    """((first place, last place + 1), the blocks there) of each part of the output."""
    columns = blocks.count.shape[1]
    edges = np.unique(np.linspace(0, columns, min(points, columns) + 1).round().astype(int))
    found = []
    for start, stop in pairwise(edges.tolist()):
        part = blocks.part(start, stop)
        found.append(((start * blocks.size, start * blocks.size + int(part.count.sum(1).max())), part))
    return found


def summary(blocks: Blocks, mass: Blocks | None = None, *, points: int = 10) -> dict[str, Any]:
    """What a report says of one arm: ``kl`` (nats), ``top1``, ``perplexity``, ``full_perplexity``, and by place the
    ``curves`` of KL and top-1; and of ``mass``, where it was measured."""
    said = {name: estimate(blocks, name).to_dict() for name in ("kl", "top1")}
    for name, measure in (("perplexity", "nll"), ("full_perplexity", "full_nll")):
        said[name] = estimate(blocks, measure).mapped(math.exp).to_dict()
    places = [place for place, _ in _parts(blocks, points)]
    curves = {name: _curve(places, curve(blocks, name, points=points)) for name in ("kl", "top1")}
    if mass is not None:
        said["mass"] = estimate(mass, "mass").to_dict()
        curves["mass"] = _curve(places, curve(mass, "mass", points=points))  # measured at some of these places
    return {"texts": len(blocks.count), "places": int(blocks.count.sum()), **said, "curves": curves}


def _curve(places: list[tuple[int, int]], found: list[tuple[int, int, Estimate]]) -> list[dict[str, float]]:
    return [
        {"from": start, "to": stop, **there.to_dict()}
        for (start, stop), (_, _, there) in zip(places, found, strict=True)
    ]
