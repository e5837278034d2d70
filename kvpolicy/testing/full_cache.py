"""What the full cache would have attended to, and how much of that a policy still holds.

Nothing here needs a whole attention map: a few queries are worked out at a time, and only those are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvpolicy.testing.attention import Attention

if TYPE_CHECKING:
    from kvpolicy.testing.seen import Seen

Array = np.ndarray

BLOCK = 2**16
"""Probabilities that are worked out and kept at once, per layer, row and KV head: all of a short text."""


class FullCache:
    """The attention of a text under the cache that drops nothing.

    Args:
        said: the text's queries and keys.
    """

    def __init__(self, said: Attention) -> None:
        self.said = said
        self._blocks: dict[tuple[int, int, int], tuple[int, Array]] = {}

    def probabilities(self, layer: int, row: int, head: int, newest: int) -> Array:
        """Attention of the query at position ``newest`` to every token up to itself.

        Returns:
            [newest + 1] float64 that sum to 1, the mean over the G query heads of KV head ``head``.

        Raises:
            IndexError: there is no such layer, row, KV head or position.
        """
        length = self.said.queries[row].shape[2]
        if not 0 <= newest < length:
            raise IndexError(f"row {row} has the positions 0..{length - 1}, not {newest}")
        place = (layer, row, head)
        first, block = self._blocks.get(place, (0, np.empty((0, 0))))
        if not first <= newest < first + len(block):
            count = max(1, BLOCK // length)
            first = newest - newest % count
            block = self._attend(layer, row, head, first, min(first + count, length))
            self._blocks[place] = first, block
        return block[newest - first, : newest + 1]

    def mass(self, seen: Seen, pool: str | None = None) -> float:
        """The share of the newest query's attention under the full cache that goes to what is attended in this pass.

        With ``pool``: of its attention to the tokens that the pool admits, what is read of it (1 where it admits none).
        """
        probabilities = self.probabilities(*seen.place, seen.newest)
        if pool is None:
            return float(probabilities[list(seen.attended())].sum())
        admitted = seen.admitted(pool)
        held = sorted(seen.attended(pool).intersection(admitted))
        whole = float(probabilities[admitted].sum())
        return float(probabilities[held].sum()) / whole if whole else 1.0

    def lost(self, seen: Seen, pool: str | None = None) -> list[tuple[int, float]]:
        """The tokens that the newest query would look at but cannot, with their shares, heaviest first."""
        probabilities = self.probabilities(*seen.place, seen.newest)
        gone = sorted(frozenset(seen.admitted(pool)) - seen.attended(pool), key=lambda token: -probabilities[token])
        return [(token, float(probabilities[token])) for token in gone]

    def _attend(self, layer: int, row: int, head: int, first: int, stop: int) -> Array:
        """Mean attention [stop - first, stop] of the queries at first..stop - 1."""
        queries, keys = self.said.queries[row][layer], self.said.keys[row][layer]
        if not 0 <= head < len(keys):
            raise IndexError(f"there is no KV head {head}: the last is {len(keys) - 1}")
        group = len(queries) // len(keys)
        asked = np.asarray(queries[head * group : (head + 1) * group, first:stop], dtype=float)
        later = np.arange(stop) > np.arange(first, stop)[:, None]
        logits = asked @ np.asarray(keys[head, :stop], dtype=float).T * self.said.scale
        logits = np.where(later, -np.inf, logits)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares: Array = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=0)
        return shares
