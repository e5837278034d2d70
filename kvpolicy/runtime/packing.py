"""Moving residents between states of one layer: into a wider workspace, and back into slots of fixed size.

Neither happens in a decode step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.plan import PoolPlan
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.shared_slots import pack_shared, unpack_shared
from kvpolicy.runtime.state import LayerState
from kvpolicy.runtime.stored import SIDES, opened_up, store_all

STORED = (".codes", ".scale", ".zero", ".open")  # what a page is as codes goes by itself
WINDOW_BUFFERS = ("queries", "query_position")


def pack(wide: LayerState, into: LayerState, clocks: Clocks) -> None:
    """Move what is resident in ``wide`` into other slots, in order of position, and lay out the rings."""
    kept_over = {name: tensor.clone() for name, tensor in into.tensors.items() if outlives_slots(name)}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for pool in (pool for pool in wide.plan.pools if not pool.shared):
        resident = wide.resident_units(pool)
        place = torch.where(resident, wide.unit_position(pool), torch.iinfo(torch.int32).max)
        kept[pool.name] = (torch.argsort(place, dim=-1, stable=True), resident.sum(-1))
    into.clear()
    for pool, source in zip(into.plan.pools, wide.plan.pools, strict=True):
        for name in (f"{pool.name}.{count}" for count in ("size", "seen")):
            if name in into.tensors:
                into.tensors[name].copy_(wide.tensors[name])
        if pool.shared:
            pack_shared(wide, source, into, pool)
            continue
        order, count = kept[pool.name]
        most = int(count.max()) if count.numel() else 0
        if most > pool.units:
            raise CacheError(
                f"pool {pool.name} keeps {most * pool.page} tokens, but only {pool.capacity} were planned; plan with "
                "the lengths that the cache will really see"
            )
        _move(wide, source, into, pool, order[..., :most], count)
        into.lay_ring(pool, count, clocks.streams[pool.stream].opened)
    for name, tensor in kept_over.items():
        into.tensors[name].copy_(tensor)


def outlives_slots(name: str) -> bool:
    """Whether a buffer stays what it was when the slots are laid out anew: the peak met, the newest queries."""
    return name.endswith(".peak") or name in WINDOW_BUFFERS


def carry(old: LayerState, wide: LayerState) -> None:
    """Copy every pool of ``old`` into the front of the same pool of a wider state."""
    for source, target in zip(old.plan.pools, wide.plan.pools, strict=True):
        if source.shared:
            unpack_shared(old, source, wide, target)
            continue
        width = min(source.capacity, target.capacity)
        span = slice(target.offset, target.offset + width)
        wide.position[:, :, span] = old.position[:, :, source.offset : source.offset + width]
        for side in SIDES:
            wide.tensors[side][:, :, span] = _numbers(old, source, side)[:, :, :width]
        for name in _pool_buffers(wide, target):
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
    real_slots = real[..., None].expand(-1, -1, -1, source.page).flatten(2)
    new.position[:, :, span] = torch.where(real_slots, old.position[place], -1)
    index = (old.rows[..., None], old.heads[..., None], slots)
    numbers = {side: _numbers(old, source, side)[index] for side in SIDES}
    if target.store is None:
        for side in SIDES:
            new.tensors[side][:, :, span] = numbers[side]
    else:
        present = new.position[:, :, span].unflatten(2, (width, target.page)) >= 0
        pages = {side: number.unflatten(2, (width, target.page)) for side, number in numbers.items()}
        store_all(new, target, pages, present)
    for name in _pool_buffers(old, source):
        kept, room = old.tensors[name], new.tensors[name]
        if kept.dim() == 2 or name.endswith(".ring"):
            continue
        inside = slots if name.endswith(".ordinal") else units
        room[:, :, : inside.shape[-1]] = kept[old.rows[..., None], old.heads[..., None], inside]


def _numbers(state: LayerState, pool: PoolPlan, side: str) -> Tensor:
    """Keys or values of a pool by slot [B, K, U * page, D], between passes."""
    if pool.store is not None:
        return opened_up(state, pool, side, settled=True)
    return state.tensors[side][:, :, state.span(pool)]


def _pool_buffers(state: LayerState, pool: PoolPlan) -> list[str]:
    """Names of what a pool keeps about its units."""
    return [name for name in state.tensors if name.startswith(f"{pool.name}.") and not name.endswith(STORED)]
