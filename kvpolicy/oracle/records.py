"""What the oracle tells of a pass. Tokens and units go by their positions (a unit by that of its first token)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """Why an update dropped what it dropped in one pool of one KV head.

    ``scores`` are the candidates'; ``lowest`` is what they say must go, ``dropped`` what went: these differ only after
    ``Oracle.adopt``.
    """

    budget: int
    scores: dict[int, float]
    protected: frozenset[int]
    lowest: frozenset[int]
    dropped: frozenset[int]


@dataclass(frozen=True)
class Hit:
    """How a leaf (number ``leaf`` of the pool's scorer) decided its hits in one pass; ``bar`` is None for ``top``.

    Where its ``signal`` itself decides something, there is a record of that too: ``scores`` are then the narrowest
    decision about each unit, 1 (the ``bar``) being on the spot, and ``hits`` are none.
    """

    head: int
    pool: str
    leaf: int
    scores: dict[int, float]
    hits: frozenset[int]
    bar: float | None
    signal: bool = False


@dataclass(frozen=True)
class Reading:
    """Why a pass read what it read of one pool of one KV head.

    ``scores`` are those of the units to choose from, ``units`` the positions that each holds, ``chosen`` those read;
    ``hits`` are those of the scorer that ranked them.
    """

    scores: dict[int, float]
    units: dict[int, tuple[int, ...]]
    chosen: frozenset[int]
    hits: tuple[Hit, ...]


@dataclass(frozen=True)
class PoolStep:
    """One pool of one KV head after a pass: positions of tokens, and the positions that each unit holds.

    ``evicted`` left the pool in this pass; ``choice`` is None where the pool was not updated or has no budget,
    ``reading`` where the pass read all of it.
    """

    kept: frozenset[int]
    evicted: frozenset[int]
    protected: frozenset[int]
    read: frozenset[int]
    units: dict[int, tuple[int, ...]]
    size: int
    choice: Choice | None
    reading: Reading | None = None


@dataclass(frozen=True)
class Step:
    """One pass of one row in one layer.

    Per KV head h: ``heads[h]`` its pools by name, ``attended[h]`` the positions resident while attending, and
    ``probabilities[h]`` [G, N, attended] their attention. ``output`` [N, Q, D] is None where no values were given.
    """

    layer: int
    row: int
    kind: str
    t: int
    prompt_len: int
    updated: bool
    heads: list[dict[str, PoolStep]]
    hits: list[Hit]
    attended: list[np.ndarray]
    probabilities: list[np.ndarray]
    output: np.ndarray | None
