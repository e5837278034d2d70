"""From signals to scores: the stages smooth, norm, hit and memory, then weights, sums and products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from kvpolicy.language import Quantity
from kvpolicy.oracle.records import Hit
from kvpolicy.oracle.signals import narrowest, signal, softmax
from kvpolicy.oracle.text import Array, Memory, Page, View
from kvpolicy.plan import ScorerPlan


@dataclass
class Scoring:
    """The scorer of one pool at work in one pass.

    ``pages`` are the pool's and ``safe`` [pages] the protected among them; ``others`` are the units of the head's other
    pools; ``stay`` is how many candidates may stay; ``names`` are the values of names in expressions.
    """

    view: View
    pool: str
    scorer: ScorerPlan
    pages: Sequence[Page]
    safe: Array
    others: Sequence[Page]
    stay: int
    names: Mapping[str, int]
    hits: list[Hit] = field(default_factory=list)

    def observe(self, at_update: bool) -> None:
        """Fold this pass into the memories; those of ``queries: {last: w}`` only where the pool updates."""
        for number, leaf in enumerate(self.scorer.leaves()):
            kind, rate = leaf.memory
            if leaf.remembers and isinstance(leaf.queries, int) == at_update:
                for page, score in zip(self.pages, self.now(number, leaf), strict=True):
                    memory = page.memory.get(number, begin(kind, page.entered))
                    page.memory[number] = fold(kind, float(rate or 0), memory, float(score), self.view.t)

    def scores(self) -> Array:
        """One score for every page of the pool."""
        return combine(self.scorer, iter([self.leaf(number, leaf) for number, leaf in enumerate(self.scorer.leaves())]))

    def leaf(self, number: int, leaf: ScorerPlan) -> Array:
        """What a leaf says: its memory where it has one, else this pass alone."""
        if not leaf.remembers:
            return self.now(number, leaf)
        kind, rate = leaf.memory
        memories = [page.memory.get(number, begin(kind, page.entered)) for page in self.pages]
        return np.array([recall(float(rate or 0), memory, self.view.t) for memory in memories])

    def now(self, number: int, leaf: ScorerPlan) -> Array:
        """What this pass alone says of every page of the pool: the stages from signal to hit."""
        if not self.pages:
            return np.zeros(0)
        ranks_cache = leaf.hit is not None and leaf.hit[0] == "top" and leaf.over == "cache"
        pages = [*self.pages, *(self.others if ranks_cache else ())]
        candidate = np.append(~self.safe, np.zeros(len(pages) - len(self.pages), dtype=bool))
        candidates = [page for page, yes in zip(pages, candidate, strict=True) if yes]
        values = signal(self.view, leaf, pages, self.pages, candidates)
        if leaf.smooth is not None or leaf.norm is not None:
            values = among_candidates(leaf, pages, candidate, values, self.stay)
        if leaf.hit is not None:
            asked = candidate if leaf.over == "candidates" else np.ones(len(pages), dtype=bool)
            values = self.hit(number, leaf.hit, pages, asked, values)
        narrow = narrowest(self.view, leaf, pages, self.pages, candidates)
        if narrow is not None:
            margins = {page.position: float(ratio) for page, ratio in zip(pages, narrow, strict=True)}
            self.hits.append(Hit(self.view.head, self.pool, number, margins, frozenset(), 1.0, signal=True))
        return values[: len(self.pages)]

    def hit(
        self, number: int, hit: tuple[str, Quantity | Fraction], pages: Sequence[Page], asked: Array, values: Array
    ) -> Array:
        """1 or 0: among the best of the pages ``asked``, or at the bar."""
        bar = None
        if isinstance(hit[1], Quantity):
            count = int(asked.sum())
            chosen = best(-int(-hit[1].evaluate(self.names) * count // 1), pages, values, asked)
        else:
            bar = float(hit[1])
            chosen = values >= bar
        scores = {page.position: float(v) for page, v, yes in zip(pages, values, asked, strict=True) if yes}
        hits = frozenset(page.position for page, yes in zip(pages, chosen, strict=True) if yes)
        self.hits.append(Hit(self.view.head, self.pool, number, scores, hits, bar))
        return chosen.astype(float)


def combine(scorer: ScorerPlan, leaves: Iterator[Array]) -> Array:
    """Weights, sums and products over the values of the leaves, in their order."""
    if scorer.op == "leaf":
        return float(scorer.weight) * next(leaves)
    parts = [combine(part, leaves) for part in scorer.parts]
    return float(scorer.weight) * (np.sum(parts, axis=0) if scorer.op == "sum" else np.prod(parts, axis=0))


def best(count: int, pages: Sequence[Page], values: Array, among: Array) -> Array:
    """The ``count`` highest of the pages ``among``, of equals the newer [pages] bool."""
    ranking = sorted(
        (index for index in range(len(pages)) if among[index]),
        key=lambda index: (values[index], pages[index].position),
        reverse=True,
    )
    chosen = np.zeros(len(pages), dtype=bool)
    chosen[ranking[: max(0, count)]] = True
    return chosen


def among_candidates(leaf: ScorerPlan, pages: Sequence[Page], candidate: Array, values: Array, stay: int) -> Array:
    """Smooth and norm, over candidates in order of position; 0 for all others."""
    order = sorted((index for index in range(len(pages)) if candidate[index]), key=lambda index: pages[index].position)
    part, result = values[order], np.zeros_like(values)
    if len(part):
        part = part if leaf.smooth is None else smoothed(*leaf.smooth, part)
        part = part if leaf.norm is None else normed(leaf.norm, part, stay)
    result[order] = part
    return result


def smoothed(kind: str, width: int, values: Array) -> Array:
    """Maximum or mean of ``width`` neighbours, 0 beyond the ends."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, width // 2), width)
    return windows.max(axis=-1) if kind == "max" else windows.mean(axis=-1)


def normed(kind: str, values: Array, stay: int) -> Array:
    """``mass``, Ada-KV's: times the share of the whole that the ``stay`` best of them hold (methods.md 4.8)."""
    if kind == "softmax":
        return softmax(values)
    total = values.max() if kind == "max" else values.sum()
    if total == 0:
        return values if kind == "max" else np.zeros_like(values)
    return values / total if kind == "max" else values * (np.sort(values)[len(values) - stay :].sum() / total)


def begin(kind: str, entered: int) -> Memory:
    """What a unit remembers when it enters."""
    if kind == "recurrence":
        return entered, 0
    return entered if kind == "last-hit" else 0.0


def fold(kind: str, rate: float, memory: Memory, score: float, t: int) -> Memory:
    """What a unit remembers after one more pass."""
    if isinstance(memory, tuple):  # recurrence: the last hit and the longest gap (LazyEviction's TS and MRI, 5.4)
        last, longest = memory
        return (t, max(longest, t - last)) if score else memory
    if kind == "last-hit":
        return t if score else memory
    return {"sum": memory + score, "decay": rate * memory + score, "max-decay": max(rate * memory, score)}[kind]


def recall(rate: float, memory: Memory, t: int) -> float:
    """The score that a memory gives at time t."""
    if not isinstance(memory, tuple):
        return float(memory)
    last, longest = memory
    return 2 * sigmoid(-(t - last) / max(longest, 1)) + rate * (2 * sigmoid(-longest) if longest else 0.0)


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))
