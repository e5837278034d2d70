"""What a claim is judged by: one KV head after a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvpolicy.language import Quantity
from kvpolicy.oracle import Step
from kvpolicy.plan import Plan, PoolPlan

if TYPE_CHECKING:
    from kvpolicy.testing.full_cache import FullCache


@dataclass(frozen=True)
class Seen:
    """KV head ``head`` after the pass ``step``; where a pool may be named, None means all of them.

    ``full`` is the attention of the same text under the full cache.
    """

    plan: Plan
    step: Step
    head: int
    full: FullCache

    @property
    def newest(self) -> int:
        """Position of the newest token."""
        return self.step.prompt_len + self.step.t - 1

    @property
    def last(self) -> int:
        """Position of the last token that this row will ever say."""
        return int(self.full.said.queries[self.step.row].shape[2]) - 1

    @property
    def place(self) -> tuple[int, int, int]:
        """Layer, row, KV head."""
        return self.step.layer, self.step.row, self.head

    @property
    def plans(self) -> dict[str, PoolPlan]:
        """The pools of this KV head as planned."""
        layer = self.plan.layers[self.step.layer]
        return {at.name: at for at in (layer.pools if layer.heads is None else layer.heads[self.head])}

    def kept(self, pool: str | None = None) -> frozenset[int]:
        """Positions resident after the pass."""
        pools = self.step.heads[self.head]
        return frozenset().union(*(at.kept for name, at in pools.items() if pool in (None, name)))

    def attended(self, pool: str | None = None) -> frozenset[int]:
        """Positions that the pass attended to: of the resident ones, those that were read."""
        pools = self.step.heads[self.head]
        return frozenset().union(*(at.read for name, at in pools.items() if pool in (None, name)))

    def held(self, pool: str | None = None) -> frozenset[int]:
        """Positions resident while the pass attended, before its update."""
        everywhere, pools = frozenset(self.step.attended[self.head].tolist()), self.step.heads[self.head]
        if pool is None or pool not in pools:
            return everywhere if pool is None else frozenset()
        moved_here = frozenset().union(*(at.evicted for name, at in pools.items() if name != pool))
        return (pools[pool].kept | pools[pool].evicted) - moved_here

    def admitted(self, pool: str | None = None) -> list[int]:
        """Positions ever admitted, ascending."""
        said = {kind: here[: self.newest + 1] for kind, here in self.full.said.kinds[self.step.row].items()}
        admitted = np.zeros(self.newest + 1, dtype=bool)
        for name, at in self.plans.items():
            if pool in (None, name):
                mine = np.logical_or.reduce([said[kind] for kind in at.admits], initial=False)
                for trait in at.above:
                    mine = mine & ~said[trait]
                admitted |= mine
        return [int(place) for place in np.flatnonzero(admitted)]

    def updated(self, pool: str | None = None) -> bool:
        """Whether a pool that has a budget was updated."""
        pools = self.step.heads[self.head]
        return any(at.choice is not None for name, at in pools.items() if pool in (None, name))

    def evaluate(self, quantity: Quantity) -> int:
        """A quantity in t, prompt_len and context, floored."""
        step = self.step
        names = {"t": step.t, "prompt_len": step.prompt_len, "context": step.prompt_len + step.t}
        value = quantity.evaluate(names)
        return value.numerator // value.denominator
