"""What a generated step of one layer is, in plain numbers: everything that the two kernels are specialised for.

A form is made from a plan (``runtime/fused.py``), the same for all layers of equal shape, and names itself by its
content, so that a graph compiled in one process finds it again in the next. Imports no triton.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

Tree = tuple[Any, ...]


@dataclass(frozen=True)
class Arrival:
    """Where the newest token goes: the pool at slot ``offset`` with ``units`` units of ``page`` slots.

    ``starts`` says what a new unit remembers: "zero", "clock", or "" where it remembers nothing; ``seed`` is that of
    the number it draws, if it draws one.
    """

    offset: int
    page: int
    units: int
    starts: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class Ranked:
    """A pool whose units are ranked: its first slot, and whether the newest token is its own."""

    offset: int
    page: int
    units: int
    arrives: bool


@dataclass(frozen=True)
class Work:
    """Steps 4 and 5 for the one pool that drops tokens in generated passes.

    ``ranked`` are the pools over which hits are ranked, in order of their slots, and ``own`` the number of the working
    one among them. Quantities are trees; ``reads`` says in which order the tensors they read are handed over:
    (name, whether there is one number for each KV head).
    """

    ranked: tuple[Ranked, ...]
    own: int
    signal: str
    heads: str
    hit: tuple[str, Any] | None
    memory: tuple[str, float]
    weight: float
    updates: bool
    budget: Tree
    window: Tree | None
    first: Tree | None
    cadence: int
    most: int
    reads: tuple[tuple[str, bool], ...]

    @property
    def reads_logits(self) -> bool:
        return self.signal in ("attention", "attention-logit")

    @property
    def units(self) -> int:
        """Units of all ranked pools together."""
        return sum(pool.units for pool in self.ranked)


@dataclass(frozen=True)
class Form:
    """One kind of step of one layer shape. G query heads, K KV heads, D head size, S slots.

    ``state`` and ``given`` say what the tensors of the op are, in order: those that a step writes, and those it only
    reads. One tensor may play several roles (the arriving token's ring is the working pool's, if that is its pool).
    """

    group: int
    kv_heads: int
    head_dim: int
    slots: int
    arrival: Arrival
    work: Work | None
    state: tuple[tuple[str, ...], ...]
    given: tuple[tuple[str, ...], ...]

    launches = 2  # kernels of a step, whatever the policy

    @property
    def name(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


FORMS: dict[str, Form] = {}


def register(form: Form) -> str:
    """Make a form known to the op by its name, which is returned."""
    FORMS[form.name] = form
    return form.name
