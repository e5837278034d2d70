"""What there is to look at: a row's text in one layer, and the part of it that one KV head sees in a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Rotate = Callable[[Array, Array], Array]  # (vectors [..., n, D], positions [n]) -> the vectors turned there
Memory = float | tuple[int, int]


@dataclass(frozen=True)
class Formula:
    """What a model makes of q.k: the factor (None: D ** -0.5), a cap, and sinks [Q]; see ``Text``."""

    scaling: float | None = None
    softcap: float | None = None
    sinks: Array | None = None


@dataclass
class Page:
    """A unit: tokens that stay or go together. ``memory`` goes by the number of a leaf of the pool's scorer."""

    entered: int
    positions: list[int] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)
    memory: dict[int, Memory] = field(default_factory=dict)
    survivor: bool = False

    @property
    def position(self) -> int:
        return self.positions[0]

    def copy(self) -> Page:
        return Page(self.entered, list(self.positions), list(self.ordinals), dict(self.memory), self.survivor)


@dataclass
class Text:
    """All that a row has said in one layer, by position: queries [Q, T, D], keys and values [K, T, D].

    Logits are q.k times ``scaling``, kept below ``softcap`` by a tanh where there is one; ``sinks`` [Q] are logits that
    belong to no token and take their share of attention.

    Where logits are given instead of queries, ``picture`` holds one [Q, p + 1] for the query at each position p.
    """

    query_heads: int
    kv_heads: int
    scaling: float
    rotate: Rotate | None
    softcap: float | None = None
    sinks: Array | None = None
    queries: Array | None = None
    keys: Array | None = None
    values: Array | None = None
    picture: list[Array] = field(default_factory=list)
    length: int = 0

    def append(self, queries: Array | None, keys: Array | None, values: Array | None, logits: Array | None) -> int:
        """Hear one pass; returns how many tokens it brought."""
        if queries is None and logits is None:
            raise ValueError("a pass needs queries and keys, or logits")
        new = int(next(array.shape[1] for array in (keys, queries, logits) if array is not None))
        self.queries, self.keys, self.values = (
            past if now is None else np.array(now, dtype=float) if past is None else np.concatenate([past, now], axis=1)
            for past, now in ((self.queries, queries), (self.keys, keys), (self.values, values))
        )
        if logits is not None:
            self.picture += [np.array(logits[:, n, : self.length + n + 1], dtype=float) for n in range(new)]
        self.length += new
        return new


@dataclass
class View:
    """What one KV head sees in one pass: its resident ``tokens`` (positions, ascending) and which of them are read.

    The last ``new`` positions of the text are this pass's queries.
    """

    text: Text
    layer: int
    head: int
    t: int
    new: int
    tokens: Array
    read: Array

    def asked(self, queries: str | int) -> Array:
        """Positions of the queries that ``queries: current | all | {last: w}`` names."""
        count = queries if isinstance(queries, int) else {"current": 1, "all": self.new}[queries]
        return np.arange(max(0, self.text.length - count), self.text.length)

    def logits(self, queries: Array) -> Array:
        """Scaled q.k [G, queries, tokens]; -inf for tokens later than the query."""
        if self.text.queries is None:
            group = self._group()
            logits = np.full((group.stop - group.start, len(queries), len(self.tokens)), -np.inf)
            for row, query in enumerate(queries):
                seen = self.tokens <= query
                logits[:, row, seen] = self.text.picture[query][group][:, self.tokens[seen]]
            return logits
        logits = self.capped(self.vectors(queries) @ self.keys().T * self.text.scaling)
        return np.where(self.tokens <= queries[:, None], logits, -np.inf)

    def capped(self, logits: Array) -> Array:
        """Scaled logits as the softmax gets them."""
        cap = self.text.softcap
        return logits if cap is None else cap * np.tanh(logits / cap)

    def sinks(self) -> Array | None:
        """The sinks of this head's query heads [G, 1, 1]."""
        return None if self.text.sinks is None else self.text.sinks[self._group(), None, None]

    def vectors(self, queries: Array) -> Array:
        """The queries' vectors [G, queries, D]."""
        return self._turned(_given(self.text.queries, "queries")[self._group()][:, queries], queries)

    def keys(self) -> Array:
        """[tokens, D]."""
        return self._turned(_given(self.text.keys, "keys")[self.head, self.tokens], self.tokens)

    def values(self) -> Array:
        """[tokens, D]."""
        return _given(self.text.values, "values")[self.head, self.tokens]

    def columns(self, pages: Sequence[Page]) -> tuple[Array, Array]:
        """Where the pages' tokens lie in ``tokens``, page by page, and where in that list each page begins."""
        lengths = [len(page.positions) for page in pages]
        columns = np.searchsorted(self.tokens, [position for page in pages for position in page.positions])
        return columns, np.cumsum([0, *lengths[:-1]])

    def holds(self, pages: Sequence[Page]) -> Array:
        """Which tokens these pages hold [tokens] bool."""
        held = np.zeros(len(self.tokens), dtype=bool)
        if pages:
            held[self.columns(pages)[0]] = True
        return held

    def _group(self) -> slice:
        """The query heads that share this KV head."""
        size = self.text.query_heads // self.text.kv_heads
        return slice(self.head * size, (self.head + 1) * size)

    def _turned(self, vectors: Array, positions: Array) -> Array:
        """Positions compact: the place of a token is its rank among the residents."""
        if self.text.rotate is None:
            return vectors
        return self.text.rotate(vectors, np.searchsorted(self.tokens, positions))


def _given(array: Array | None, what: str) -> Array:
    if array is None:
        raise ValueError(f"this policy looks at {what}, but the oracle was given none")
    return array
