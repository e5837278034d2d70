"""What a row's queries want to see, and the unit keys and queries that make them see it.

A pattern says, for each query, how strongly it wants each token: scaled logits above those of ordinary text. Tokens
that are always wanted alike share one direction of key space, so any such picture is realised exactly, up to rounding
to float32, with keys of length 1 (unless the pattern is about lengths). Two more pairs of directions make text
life-like: a fading interest in what lies far back (keys and queries on a half circle, as rotary embeddings would have
it), and noise that differs by head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kvpolicy.language.base import Complaint

Array = np.ndarray

NOISE_DIMS = 8


class Realised(NamedTuple):
    """Queries [Q, T, D], keys [K, T, D] and values [K, T, D], float32."""

    queries: Array
    keys: Array
    values: Array


@dataclass
class Scene:
    """One row in one layer: ``prompt`` tokens, then ``steps`` others, as Q = ``heads`` query heads look at them.

    ``looks`` are (which tokens [T] bool, their logits by query [T], whose they are [Q, T] bool); a token's logit is the
    sum of all that name it. ``depth`` [Q, T] is how far the logit falls from the query's own token to one a whole text
    away, ``loudness`` [Q, T] the standard deviation of what each query adds of its own (``noise``, unless hushed).
    ``short`` [Q, T] are the tokens whose keys are short where others are from 3 to 3 + ``spread`` long, as the query
    heads of a KV head say; None where all have length 1. ``asked`` [Q, T] are the queries that what is being drawn is
    about, ``singled`` says that every token has a direction to itself, ``late`` holds what can only be drawn while the
    text is said.
    """

    prompt: int
    steps: int
    random: np.random.Generator
    noise: float = 0.0
    heads: int = 1
    row: int = 0
    layer: int = 0
    looks: list[tuple[Array, Array, Array]] = field(default_factory=list)
    short: Array | None = None
    spread: float = 0.0
    singled: bool = False
    late: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.asked = np.ones((self.heads, self.length), dtype=bool)
        self.depth = np.zeros((self.heads, self.length))
        self.loudness = np.full((self.heads, self.length), self.noise)
        self.look(range(self.length), 0.0)  # ordinary text

    @property
    def length(self) -> int:
        """T."""
        return self.prompt + self.steps

    @property
    def now(self) -> Array:
        """Position of each query [T]."""
        return np.arange(self.length)

    @contextmanager
    def about(self, asked: Array) -> Iterator[None]:
        """What is drawn inside is about these queries [Q, T] bool alone, of those that it was about outside."""
        before = self.asked
        self.asked = before & asked
        try:
            yield
        finally:
            self.asked = before

    def look(self, tokens: Sequence[int], logits: Array | float) -> None:
        """Every query wants these tokens by so much more, a number or one per query [T]."""
        member = np.zeros(self.length, dtype=bool)
        member[list(tokens)] = True
        self.looks.append((member, np.broadcast_to(np.asarray(logits, dtype=float), self.length), self.asked))

    def fade(self, depth: float) -> None:
        """Every query wants tokens less the farther back they lie, by ``depth`` a whole text away."""
        self.depth = self.depth + depth * self.asked

    def hush(self) -> None:
        """No noise."""
        self.loudness = np.where(self.asked, 0.0, self.loudness)

    def shorten(self, tokens: Sequence[int], spread: float) -> None:
        """Keys of many lengths, up to 3 + ``spread``: these tokens have the shortest ones."""
        member = np.zeros((self.heads, self.length), dtype=bool)
        member[np.ix_(self.asked.any(axis=1), np.array(tokens, dtype=int))] = True
        self.short = member if self.short is None else self.short | member
        self.spread = max(self.spread, spread)

    def wanted(self, head: int = 0) -> Array:
        """Scaled logits [query, token] in a query head that sees the pattern, but for the noise."""
        kinds, kind = self.kinds()
        distance = np.subtract.outer(self.now, self.now)
        fading = self.depth[head][:, None] / 2 * np.cos(np.pi * distance / self.length)
        return self._strengths(kinds, head)[:, kind] + fading

    @property
    def dims(self) -> int:
        """Directions of key space that the scene takes."""
        parts = 2 * bool(self.depth.any()) + NOISE_DIMS * bool(self.loudness.any()) + (self.short is not None)
        return int(self.kinds()[0].shape[1] + parts)

    @property
    def part(self) -> float:
        """Length of each part of a key."""
        return float((1 + bool(self.depth.any()) + bool(self.loudness.any())) ** -0.5)

    def realise(self, kv_heads: int, head_dim: int, sees: Sequence[bool]) -> Realised:
        """Vectors of D = ``head_dim`` for K KV heads; ``sees`` [Q] says which query heads see the looks.

        A key is a sum of up to three perpendicular parts of equal length. What that takes from a logit, and the
        attention's own scaling, the queries make up for. What makes it longer than 1 is perpendicular to all queries.
        """
        kinds, kind = self.kinds()
        end, angle = kinds.shape[1], np.pi * self.now / self.length
        circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        part = self.part
        queries, keys = np.zeros((self.heads, self.length, head_dim)), np.zeros((kv_heads, self.length, head_dim))
        keys[:, self.now, kind] = part
        for head in np.flatnonzero(sees):
            queries[head, :, :end] = self._strengths(kinds, int(head)) / part
        if self.depth.any():
            keys[..., end : end + 2] = circle * part
            queries[..., end : end + 2] = circle * self.depth[..., None] / 2 / part
            end += 2
        if self.loudness.any():
            directions = self.random.normal(size=(kv_heads, self.length, NOISE_DIMS))
            interests = self.random.normal(size=(self.heads, self.length, NOISE_DIMS))
            keys[..., end : end + NOISE_DIMS] = directions * part / np.linalg.norm(directions, axis=-1, keepdims=True)
            queries[..., end : end + NOISE_DIMS] = interests * self.loudness[..., None] / part
            end += NOISE_DIMS
        if self.short is not None:
            short = self.short.reshape(kv_heads, -1, self.length).any(axis=1)
            drawn = self.random.random((kv_heads, self.length))
            lengths = np.where(short, 1 + drawn, 3 + self.spread * drawn)
            keys[..., end] = np.sqrt(lengths**2 - 1)
        values = self.random.normal(size=keys.shape)
        return Realised(*(array.astype(np.float32) for array in (queries * head_dim**0.5, keys, values)))

    def kinds(self) -> tuple[Array, Array]:
        """Which looks name each kind of token [looks, kinds], and the kind of each token [T]: its direction."""
        members = np.stack([member for member, _, _ in self.looks])
        if self.singled:
            return members, self.now
        kinds, kind = np.unique(members, axis=1, return_inverse=True)
        return kinds, kind.reshape(-1)

    def _strengths(self, kinds: Array, head: int) -> Array:
        """What each query of a head wants of each kind [query, kind]."""
        return np.stack([np.where(asked[head], logits, 0.0) for _, logits, asked in self.looks], axis=1) @ kinds


def room(dims: int, asked: int) -> int:
    """A head size that holds ``dims`` directions: a power of 4, so that scaling by its root is exact in float32."""
    if not asked:
        return next(size for size in (4**power for power in range(2, 20)) if size >= dims)
    if asked < dims:
        raise Complaint(f"{asked} is too small: this pattern takes {dims} directions", "leave it out")
    return asked
