"""The slots of one layer: the tensors the plan lists, and nothing else.

A *unit* is a page of its pool (a token where page is 1); it lies in ``page`` neighbouring slots. An empty slot has
position -1. Which unit of a pool is free is told by a ring of unit ids per row and KV head: arrivals take the id at
``opened - 1`` (so the open page is found there too), and an update writes the freed ids at ``tail``. ``opened`` is a
number of the row's clock, or of each head where another pool moves units here.

A pool stored in few bits has positions among the others', behind them, and codes of its own (``stored.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.attention import mix_shared
from kvpolicy.plan import LayerPlan, PoolPlan
from kvpolicy.runtime.clocks import TORCH_DTYPES, Clocks
from kvpolicy.runtime.ranks import ALONE, Ranks
from kvpolicy.runtime.stored import opened_up


class LayerState:
    """Tensors of one layer by buffer name, and views of them by pool. Shapes: see ``plan.structure``."""

    def __init__(self, plan: LayerPlan, device: torch.device, clocks: Clocks, ranks: Ranks = ALONE) -> None:
        self.plan, self.clocks, self.ranks = plan, clocks, ranks
        self.pools = {pool.name: pool for pool in plan.pools}
        self.names_read = {name for pool in plan.pools for _, quantity in pool.quantities() for name in quantity.names}
        self.tensors: dict[str, Tensor] = {
            buffer.name: torch.zeros(buffer.shape, dtype=TORCH_DTYPES[buffer.dtype], device=device)
            for buffer in plan.buffers
        }
        self.keys, self.values = self.tensors["keys"], self.tensors["values"]
        self.position = self.tensors["position"]
        rows, heads = self.position.shape[:2]
        self.rows = torch.arange(rows, device=device)[:, None]
        self.heads = torch.arange(heads, device=device)[None, :]
        self.layer = torch.tensor(plan.index, device=device)
        members = torch.tensor(plan.members, device=device) if plan.members else self.heads[0]
        self.kv_heads = members[None, :]  # their numbers in the model, where ``heads`` are those among the slots
        self.clear()

    def clear(self) -> None:
        """Empty every slot and lay out every ring."""
        for tensor in self.tensors.values():
            tensor.zero_()
        self.position.fill_(-1)
        for pool in self.plan.shared:
            self.tensors[f"{pool.name}.position"].fill_(-1)
            self.tensors[f"{pool.name}.owner"].fill_(-1)
        if "queries" in self.tensors:
            self.tensors["query_position"].fill_(-1)
        nothing = torch.zeros(self.position.shape[:2], dtype=torch.int64, device=self.position.device)
        for pool in self.plan.pools:
            if not pool.shared:
                self.lay_ring(pool, nothing, nothing[:, 0])

    def lay_ring(self, pool: PoolPlan, count: Tensor, opened: Tensor) -> None:
        """Lay out a ring anew: units from ``count`` [B, K] up are free, the newest one, if any, is ``count - 1``.

        ``opened`` [B] is where the stream's clock stands; the free units follow from there.
        """
        steps = torch.arange(pool.units, device=count.device)
        ring, tail = self.tensors[f"{pool.name}.ring"], self.tensors[f"{pool.name}.tail"]
        if pool.fed:
            opened = torch.zeros_like(opened)
            self.tensors[f"{pool.name}.opened"].zero_()
        ring.copy_((count[..., None] + steps - opened[:, None, None]) % pool.units)
        tail.copy_(opened[:, None] + pool.units - count)

    def span(self, pool: PoolPlan) -> slice:
        """The slots of a pool: of those that each head has, or of ``all_positions``, where shared ones lie behind."""
        return slice(pool.offset, pool.offset + pool.capacity)

    def slot_positions(self, pool: PoolPlan) -> Tensor:
        """Positions by slot of a pool [B, K, U * page]; of a shared slot, -1 to all heads but its owner."""
        if not pool.shared:
            return self.position[:, :, self.span(pool)]
        owned = self.tensors[f"{pool.name}.owner"][:, None] == self.heads[..., None]
        return torch.where(owned, self.tensors[f"{pool.name}.position"][:, None], -1)

    @property
    def all_positions(self) -> Tensor:
        """Positions by slot of the layer, shared slots at the end [B, K, S + shared]."""
        shared = [self.slot_positions(pool) for pool in self.plan.shared]
        return torch.cat([self.position, *shared], dim=2) if shared else self.position

    @property
    def shared_slots(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys and values [B, T, D] and owners [B, T] of each shared pool."""
        names = ("keys", "values", "owner")
        return [tuple(self.tensors[f"{pool.name}.{name}"] for name in names) for pool in self.plan.shared]  # type: ignore[misc]

    def mix(self, probabilities: Tensor) -> Tensor:
        """Attention [B, K, G, D] of probabilities [B, K, G, S + shared], slots as in ``all_positions``."""
        own, *shared = probabilities.split([self.position.shape[2], *(pool.capacity for pool in self.plan.shared)], -1)
        out = torch.matmul(own.to(self.values.dtype), self.all_values())
        for part, (_, values, _) in zip(shared, self.shared_slots, strict=True):
            out = out + mix_shared(part, values)
        return out

    def pool_positions(self, pool: PoolPlan) -> Tensor:
        """Positions by unit [B, K, U, page]."""
        return self.slot_positions(pool).unflatten(2, (pool.units, pool.page))

    def by_head(self, pool: PoolPlan, name: str) -> Tensor:
        """A buffer of a pool [B, K, U, ...]; every head sees all of a shared one."""
        tensor = self.tensors[f"{pool.name}.{name}"]
        return tensor[:, None].expand(-1, self.heads.shape[1], *tensor.shape[1:]) if pool.shared else tensor

    def resident_units(self, pool: PoolPlan) -> Tensor:
        """Which units hold a token [B, K, U]; pages fill from their first slot."""
        return self.pool_positions(pool)[..., 0] >= 0

    def unit_position(self, pool: PoolPlan) -> Tensor:
        """Position of each unit's first token [B, K, U]; -1 where empty."""
        return self.pool_positions(pool)[..., 0]

    def opened(self, pool: PoolPlan) -> Tensor:
        """How many units have been taken from the ring [B, K]."""
        own = self.tensors.get(f"{pool.name}.opened")
        return self.clocks.streams[pool.stream].opened[:, None] if own is None else own

    def seen(self, pool: PoolPlan) -> Tensor:
        """Tokens ever admitted [B, K], or [B, 1] where heads do not differ."""
        seen = self.clocks.streams[pool.stream].seen[:, None]
        return seen + self.tensors[f"{pool.name}.seen"] if pool.fed else seen

    def count(self, pool: PoolPlan) -> Tensor:
        """Resident units [B, K], from the ring: ``opened`` have been taken, ``tail`` have been put back."""
        return pool.units - self.tensors[f"{pool.name}.tail"] + self.opened(pool)

    def newest_unit(self, pool: PoolPlan) -> Tensor:
        """The unit last taken from the ring [B, K]."""
        index = ((self.opened(pool) - 1) % pool.units)[..., None].expand(*self.position.shape[:2], 1)
        return self.tensors[f"{pool.name}.ring"].gather(2, index).squeeze(2).long()

    def pool_keys(self, pool: PoolPlan) -> Tensor:
        """Keys of a pool by slot [B, K, U * page, D] in a generated pass, or of a workspace."""
        return self._numbers(pool, "keys")

    def pool_values(self, pool: PoolPlan) -> Tensor:
        """Its values."""
        return self._numbers(pool, "values")

    def all_keys(self) -> Tensor:
        """Keys of the layer by slot [B, K, S, D], as ``pool_keys``."""
        return self._all("keys")

    def all_values(self) -> Tensor:
        """Its values."""
        return self._all("values")

    def _numbers(self, pool: PoolPlan, side: str) -> Tensor:
        if pool.store is None:
            return self.tensors[side][:, :, self.span(pool)]
        return opened_up(self, pool, side, settled=False)

    def _all(self, side: str) -> Tensor:
        stored = sorted((pool for pool in self.plan.pools if pool.store is not None), key=lambda pool: pool.offset)
        if not stored:
            return self.tensors[side]
        return torch.cat([self.tensors[side], *(self._numbers(pool, side) for pool in stored)], dim=2)

    def page_max(self, pool: PoolPlan, by_token: Tensor) -> Tensor:
        """What a token-level score [B, K, U * page] says of units: the maximum over the tokens of a page."""
        if pool.page == 1:
            return by_token
        paged = by_token.unflatten(2, (pool.units, pool.page))
        return paged.masked_fill(self.pool_positions(pool) < 0, float("-inf")).amax(-1)

    def all_tensors(self) -> list[Tensor]:
        """Every allocated tensor; all have rows first."""
        return list(self.tensors.values())
