"""A prompt turn: its tokens wait in a workspace beside the slots until the turn's last pass decides who stays.

The workspace is a layer state like any other, only wider: what is resident keeps its unit numbers, the turn's tokens
take the units behind them in order of arrival. The same code scores and protects both. At the end the residents are
packed into the layer's own slots. Prompt passes are eager: shapes here follow the prompt.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvpolicy.plan import ModelGeometry, PoolPlan
from kvpolicy.plan.buffers import layer_buffers
from kvpolicy.runtime.clocks import Clocks, Places, StreamClock
from kvpolicy.runtime.packing import carry
from kvpolicy.runtime.pool import PoolPolicy
from kvpolicy.runtime.state import LayerState
from kvpolicy.scorers.memory import CLOCKED
from kvpolicy.scorers.place import drawn


class Turn:
    """The workspace of one layer during a prompt turn. ``base`` units of each pool were resident before it."""

    def __init__(self, state: LayerState, clocks: Clocks, geometry: ModelGeometry, empty: bool) -> None:
        self.geometry = geometry
        held = {pool.name: state.resident_units(pool).sum(-1) for pool in state.plan.shared}
        self.base = {pool.name: 0 if empty else pool.units for pool in state.plan.pools}
        if not empty:  # units of the fullest head, so that all ranks number alike
            self.base |= {name: state.ranks.largest(int(count.max())) for name, count in held.items()}
        self.begun = False
        self.state = state
        self.landing: dict[str, int] = {}  # by pool that sends, the first of the units that it fills elsewhere
        self.newest = {
            pool.name: held[pool.name] - 1
            if pool.shared
            else torch.full_like(state.tensors[f"{pool.name}.tail"], -1)
            if empty
            else state.newest_unit(pool)
            for pool in state.plan.pools
        }

    def widen(self, policies: dict[str, PoolPolicy], clocks: Clocks) -> None:
        """Make room for the tokens of one more pass in the pools that admit them; what is clocked starts now."""
        old, first = self.state, not self.begun
        self.begun = True
        room: dict[str, int] = {}
        for pool in (old.plan.pools[index] for index in old.plan.order):  # those that send come first
            room[pool.name] = self.base[pool.name] + -(-clocks.streams[pool.stream].turn_room // pool.page)
            for source in (other for other in old.plan.pools if other.to == pool.name):
                self.landing[source.name] = room[pool.name]
                room[pool.name] += room[source.name]
        pools: list[PoolPlan] = []
        offset = 0
        for pool in old.plan.pools:  # here everything is at the model's precision, head by head
            capacity = max(1, room[pool.name]) * pool.page
            pools.append(replace(pool, capacity=capacity, offset=offset, store=None, shared=False))
            offset += pools[-1].capacity
        plan = replace(old.plan, pools=tuple(pools))
        plan = replace(plan, buffers=layer_buffers(plan, self.geometry, old.position.shape[0]))
        wide = LayerState(plan, old.position.device, clocks, old.ranks)
        for policy in policies.values():
            for leaf in policy.leaves:
                if leaf.memory in CLOCKED:
                    memory = wide.tensors[f"{policy.name}.memory.{leaf.number}"]
                    memory.copy_(clocks.t[:, None, None].expand_as(memory))
        if any(self.base.values()) or not first:
            carry(old, wide)
        self.state = wide

    def admit(
        self,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        places: Places,
        clocks: Clocks,
        policies: dict[str, PoolPolicy],
    ) -> None:
        """Write a pass's tokens, each into the pool that admits it.

        key and value [B, K, N, D], position [B, N] (-1 for padding), and by stream their ``places`` [B, N] within the
        turn (-1 elsewhere).
        """
        state = self.state
        for pool in state.plan.pools:
            newest, clock = self.newest[pool.name], clocks.streams[pool.stream]
            place = places[pool.stream]
            if place is not None:
                self._write(pool, key, value, position, place, clock)
                self._enter(policies[pool.name], pool)
                fresh = clock.turn_tokens - clock.heard - _left_open(pool, clock)
                last = self.base[pool.name] + -(-fresh // pool.page) - 1
                newest = torch.where(fresh[:, None] > 0, last[:, None], newest)
            state.lay_ring(pool, newest + 1, clock.opened)

    def _write(
        self,
        pool: PoolPlan,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        place: Tensor,
        clock: StreamClock,
    ) -> None:
        """The tokens of one pool: those that have a ``place`` [B, N].

        They lie behind ``base`` in order, but that what an update in the middle of the turn left open is filled first.
        """
        state = self.state
        row, column = (place >= 0).nonzero(as_tuple=True)
        behind = (place - (clock.heard + _left_open(pool, clock))[:, None])[row, column][:, None]
        opened = (self.newest[pool.name][row] + 1) * pool.page
        inside = behind + torch.where(behind < 0, opened, self.base[pool.name] * pool.page)  # [tokens, K]
        row = row[:, None]
        slot = (row, state.heads, pool.offset + inside)
        state.keys[slot] = key[row, state.heads, column[:, None]]
        state.values[slot] = value[row, state.heads, column[:, None]]
        state.position[slot] = position[row, column[:, None]].to(torch.int32).expand_as(inside)
        if pool.needs_ordinals:
            ordinal = (clock.seen - clock.turn_tokens)[row] + place[row, column[:, None]]
            state.tensors[f"{pool.name}.ordinal"][row, state.heads, inside] = ordinal.to(torch.int32).expand_as(inside)

    def _enter(self, policy: PoolPolicy, pool: PoolPlan) -> None:
        """Draw what is drawn at entry; take the bounds of pages from their keys."""
        state = self.state
        for leaf in policy.leaves:
            if leaf.signal == "random":
                number = state.tensors[f"{pool.name}.drawn.{leaf.number}"]
                places = state.unit_position(pool).long()
                seed = int(leaf.args.get("seed", 0))
                number.copy_(drawn(seed, state.layer, state.kv_heads[..., None], places))
        if f"{pool.name}.high" in state.tensors:
            keys = state.keys[:, :, state.span(pool)].unflatten(2, (pool.units, pool.page))
            resident = (state.pool_positions(pool) >= 0)[..., None]
            high = keys.masked_fill(~resident, float("-inf")).amax(3)
            low = keys.masked_fill(~resident, float("inf")).amin(3)
            some = resident.any(3)
            state.tensors[f"{pool.name}.high"].copy_(torch.where(some, high, 0.0))
            state.tensors[f"{pool.name}.low"].copy_(torch.where(some, low, 0.0))


def _left_open(pool: PoolPlan, clock: StreamClock) -> Tensor:
    """Tokens [B] that the page has room for which an update in the middle of the turn left open; mostly none."""
    return -clock.heard % pool.page
