"""Step 2 on tensors: which units of a pool a generated pass reads, and attention over those alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvpolicy.plan import PoolPlan, needs
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.pool import FIRST_KEY, PoolPolicy, order_keys
from kvpolicy.runtime.quantities import Whole, floored
from kvpolicy.runtime.state import LayerState
from kvpolicy.scorers.sight import Sight


class Reader:
    """The answer of one pool to what is read: its newest unit, and the best of the others.

    A pool that another feeds has no newest unit of its own: what arrives there is complete.
    """

    def __init__(self, plan: PoolPlan) -> None:
        assert plan.read is not None
        self.name = plan.name
        self.fed = plan.fed
        self.top = plan.read.top.tree
        self.most = plan.read_units
        self.policy = PoolPolicy.reading(plan)
        single = plan.page == 1
        wanted = frozenset().union(*(needs(leaf.signal) for leaf in plan.read.scorer.leaves()))
        self.reads_logits = "logits" in wanted or (single and "bounds" in wanted)

    def choose(self, state: LayerState, clocks: Clocks, values: Mapping[str, Whole], sight: Sight) -> Tensor:
        """The units to read, int64 [B, K, P], in any order; -1 where there are fewer."""
        pool = state.pools[self.name]
        resident = state.resident_units(pool)
        sight.candidates = {self.name: resident}
        score = self.policy.score({"current": sight, "all": sight}, clocks, values)
        tokens = floored(self.top, values)
        count = -(-tokens // pool.page)
        place = state.unit_position(pool)
        newest = place.argmax(-1, keepdim=True)
        if not self.fed:
            count = count - 1
            resident = resident.scatter(-1, newest, False)
        keys = order_keys(score, place, resident, FIRST_KEY)
        key, unit = keys.topk(min(self.most, pool.units), dim=-1)
        wanted = count[..., None] if isinstance(count, Tensor) else count
        chosen = (torch.arange(key.shape[-1], device=key.device) < wanted) & (key > FIRST_KEY)
        unit = torch.where(chosen, unit, -1)
        if self.fed:
            return unit
        return torch.cat([torch.where(place.gather(-1, newest) >= 0, newest, -1), unit], dim=-1)


def read_slots(state: LayerState, chosen: Mapping[str, Tensor]) -> Tensor:
    """Which slots are read, shared ones at the end [B, K, S]: all of a pool that does not choose, of another those of
    its ``chosen`` units."""
    parts = []
    for pool in sorted(state.plan.pools, key=lambda pool: pool.offset):
        index = chosen.get(pool.name)
        resident = state.slot_positions(pool) >= 0
        if index is not None:
            units = torch.zeros(*resident.shape[:2], pool.units + 1, dtype=torch.bool, device=index.device)
            units.scatter_(-1, torch.where(index < 0, pool.units, index), True)
            resident = resident & units[..., :-1].repeat_interleave(pool.page, dim=-1)
        parts.append(resident)
    return torch.cat(parts, dim=-1)
