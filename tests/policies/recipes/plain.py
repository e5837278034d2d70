"""What transcriptions of methods are written in: NumPy, lists of positions, and nothing of kvpolicy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Head(NamedTuple):
    """What one KV head keeps after a pass, and what its query read in it (None: whatever was there)."""

    kept: set[int]
    read: set[int] | None = None


@dataclass(frozen=True)
class Layer:
    """What one layer says: queries [Q, T, D], keys and values [K, T, D] by position; the first ``prompt`` are given.

    Query heads q * G .. q * G + G - 1 share KV head q. ``number`` of ``layers`` is this layer's, from 0.
    """

    number: int
    layers: int
    prompt: int
    queries: Array
    keys: Array
    values: Array

    @property
    def heads(self) -> range:
        """The KV heads."""
        return range(len(self.keys))

    @property
    def generated(self) -> range:
        """Positions of the generated tokens, one a step."""
        return range(self.prompt, self.keys.shape[1])

    def group(self, head: int) -> Array:
        """The queries [G, T, D] that share a KV head."""
        size = len(self.queries) // len(self.keys)
        return self.queries[head * size : (head + 1) * size]

    def logits(self, head: int, queries: int | Sequence[int], tokens: Iterable[int]) -> Array:
        """Scaled q.k [G, queries, tokens] ([G, tokens] of one query), -inf for tokens that a query cannot see yet."""
        tokens, asked = list(tokens), np.atleast_1d(queries)
        logits = self.group(head)[:, asked] @ self.keys[head][tokens].T / np.sqrt(self.keys.shape[-1])
        logits = np.where(np.array(tokens) <= asked[:, None], logits, -np.inf)
        return logits[:, 0] if isinstance(queries, int) else logits

    def attention(self, head: int, queries: int | Sequence[int], tokens: Iterable[int]) -> Array:
        """Softmax of ``logits`` over the tokens given."""
        return softmax(self.logits(head, queries, tokens))


def softmax(logits: Array) -> Array:
    """Over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def top(
    count: int, scores: Mapping[int, float] | Sequence[float] | Array, among: Collection[int] | None = None
) -> set[int]:
    """The ``count`` highest-scored; of equals the newer. ``scores`` go by position, or with ``among`` in its order."""
    by_position = scores if isinstance(scores, Mapping) else dict(zip(among or range(len(scores)), scores, strict=True))
    ranking = sorted(by_position, key=lambda position: (by_position[position], position), reverse=True)
    return set(ranking[: max(0, count)])


def smoothed(kind: str, width: int, scores: Array) -> Array:
    """The max or mean of ``width`` (odd) neighbours along the last axis, stride 1, zeros beyond the ends."""
    beyond = [(0, 0)] * (scores.ndim - 1) + [(width // 2, width // 2)]
    shifted = [np.pad(scores, beyond)[..., at : at + scores.shape[-1]] for at in range(width)]
    return np.max(shifted, axis=0) if kind == "max" else np.mean(shifted, axis=0)
