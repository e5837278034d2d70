"""Moving residents between states of one layer: into a wider workspace, and back into slots of fixed size.

Neither happens in a decode step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.plan import PoolPlan
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.state import LayerState

SLOT_BUFFERS = ("keys", "values", "position")
WINDOW_BUFFERS = ("queries", "query_position")


def pack(wide: LayerState, into: LayerState, clocks: Clocks) -> None:
    """Move what is resident in ``wide`` into other slots, in order of position, and lay out the rings."""
    kept_over = {name: tensor.clone() for name, tensor in into.tensors.items() if outlives_slots(name)}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for pool in wide.plan.pools:
        resident = wide.resident_units(pool)
        place = torch.where(resident, wide.unit_position(pool), torch.iinfo(torch.int32).max)
        kept[pool.name] = (torch.argsort(place, dim=-1, stable=True), resident.sum(-1))
    into.clear()
    for pool, source in zip(into.plan.pools, wide.plan.pools, strict=True):
        order, count = kept[pool.name]
        most = int(count.max()) if count.numel() else 0
        if most > pool.units:
            raise CacheError(
                f"pool {pool.name} keeps {most * pool.page} tokens, but only {pool.capacity} were planned; plan with "
                "the lengths that the cache will really see"
            )
        _move(wide, source, into, pool, order[..., :most], count)
        into.lay_ring(pool, count, clocks.streams[pool.stream].opened)
        if pool.size_read:
            into.tensors[f"{pool.name}.size"].copy_(wide.tensors[f"{pool.name}.size"])
    for name, tensor in kept_over.items():
        into.tensors[name].copy_(tensor)


def outlives_slots(name: str) -> bool:
    """Whether a buffer stays what it was when the slots are laid out anew: the peak met, the newest queries."""
    return name.endswith(".peak") or name in WINDOW_BUFFERS


def carry(old: LayerState, wide: LayerState) -> None:
    """Copy every pool of ``old`` into the front of the same pool of a wider state."""
    for source, target in zip(old.plan.pools, wide.plan.pools, strict=True):
        for name in SLOT_BUFFERS:
            width = min(source.capacity, target.capacity)
            wide.tensors[name][:, :, target.offset : target.offset + width] = old.tensors[name][
                :, :, source.offset : source.offset + width
            ]
        for name in _pool_buffers(old, source):
            kept, room = old.tensors[name], wide.tensors[name]
            if kept.dim() == 2:
                room.copy_(kept)
            else:
                width = min(kept.shape[2], room.shape[2])
                room[:, :, :width] = kept[:, :, :width]


def _move(old: LayerState, source: PoolPlan, new: LayerState, target: PoolPlan, units: Tensor, count: Tensor) -> None:
    """Gather ``units`` [B, K, V] of a pool into the first V units of another state; ``count`` [B, K] are real."""
    width = units.shape[-1]
    if width == 0:
        return
    real = torch.arange(width, device=units.device) < count[..., None]
    slots = (units[..., None] * source.page + torch.arange(source.page, device=units.device)).flatten(2)
    place = (old.rows[..., None], old.heads[..., None], slots + source.offset)
    span = slice(target.offset, target.offset + width * target.page)
    for name in ("keys", "values"):
        new.tensors[name][:, :, span] = old.tensors[name][place]
    real_slots = real[..., None].expand(-1, -1, -1, source.page).flatten(2)
    new.position[:, :, span] = torch.where(real_slots, old.position[place], -1)
    for name in _pool_buffers(old, source):
        kept, room = old.tensors[name], new.tensors[name]
        if kept.dim() == 2 or name.endswith(".ring"):
            continue
        index = slots if name.endswith(".ordinal") else units
        room[:, :, : index.shape[-1]] = kept[old.rows[..., None], old.heads[..., None], index]


def _pool_buffers(state: LayerState, pool: PoolPlan) -> list[str]:
    """Names of what a pool keeps about its units."""
    return [name for name in state.tensors if name.startswith(f"{pool.name}.") and name not in SLOT_BUFFERS]
