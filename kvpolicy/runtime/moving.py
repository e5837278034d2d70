"""`evict: {to: pool}` on tensors: units leave one pool and enter another, whole, with their positions.

What scorers have seen of this pass moves with them, so that the other pool can rank what has just arrived.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvpolicy.plan import PoolPlan
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.pool import PoolPolicy
from kvpolicy.runtime.state import LayerState
from kvpolicy.runtime.stored import SIDES, write_pages
from kvpolicy.scorers.sight import Sight


def move(
    source: PoolPlan,
    target: PoolPolicy,
    state: LayerState,
    clocks: Clocks,
    leaving: tuple[Tensor, Tensor],
    places: Tensor | None,
    sights: Iterable[Sight],
) -> None:
    """Copy units to another pool; the caller empties the slots that they leave.

    ``leaving`` are unit ids of ``source`` [B, K, V], none twice, and which of them go [B, K, V]: the first ones, in a
    generated pass. ``places`` are the units of the other pool that they take, none twice; None takes its free ones.
    """
    pool = state.pools[target.name]
    unit, gone = leaving
    if places is None:
        places = _taken(state, pool, gone)
    inside = torch.arange(pool.page, device=unit.device)
    start = (state.rows[..., None], state.heads[..., None])
    old = (source.offset + unit[..., None] * pool.page + inside).flatten(2)
    new = (pool.offset + places[..., None] * pool.page + inside).flatten(2)
    yes = gone[..., None].expand(-1, -1, -1, pool.page).flatten(2)
    position = state.position[(*start, old)]
    _carry_along(sights, old, new, yes & (position >= 0))
    _copy_numbers(source, pool, state, unit, places, gone)
    state.position[(*start, new)] = torch.where(yes, position, state.position[(*start, new)])
    state.tensors[f"{pool.name}.seen"] += (yes & (position >= 0)).sum(-1)
    target.arrive(state, clocks, places, gone)


def _taken(state: LayerState, pool: PoolPlan, gone: Tensor) -> Tensor:
    """The next free units of a fed pool [B, K, V]; behind those taken the ring goes on, so that none comes twice."""
    opened, ring = state.tensors[f"{pool.name}.opened"], state.tensors[f"{pool.name}.ring"]
    steps = torch.arange(gone.shape[-1], device=gone.device)
    places = ring.gather(-1, (opened[..., None] + steps) % pool.units).long()
    opened += gone.sum(-1)
    return places


def _copy_numbers(
    source: PoolPlan, pool: PoolPlan, state: LayerState, unit: Tensor, places: Tensor, gone: Tensor
) -> None:
    """Keys and values, as numbers or as codes, and the boxes of keys."""
    start, page = (state.rows[..., None], state.heads[..., None]), pool.page
    inside = torch.arange(page, device=unit.device)
    old = (unit[..., None] * page + inside).flatten(2)
    yes = gone[..., None].expand(-1, -1, -1, page).flatten(2)[..., None]
    pages = {
        side: numbers[(*start, old)].unflatten(2, (-1, page))
        for side, numbers in zip(SIDES, (state.pool_keys(source), state.pool_values(source)), strict=True)
    }
    present = state.position[(*start, old + source.offset)].unflatten(2, (-1, page)) >= 0
    if pool.store is not None:
        write_pages(state, pool, places, pages, present, gone)
    else:
        new = (*start, (pool.offset + places[..., None] * page + inside).flatten(2))
        for side in SIDES:
            held = state.tensors[side]
            held[new] = torch.where(yes, pages[side].flatten(2, 3), held[new])
    for side, filler in (("high", float("-inf")), ("low", float("inf"))):
        box = state.tensors.get(f"{pool.name}.{side}")
        if box is not None:
            keys = pages["keys"].masked_fill(~present[..., None], filler)
            fresh = keys.amax(3) if side == "high" else keys.amin(3)
            box[(*start, places)] = torch.where(gone[..., None], fresh, box[(*start, places)])


def _carry_along(sights: Iterable[Sight], old: Tensor, new: Tensor, moved: Tensor) -> None:
    """Move what scorers saw at slots ``old`` [B, K, n] to slots ``new``, in place, each tensor once."""
    done: list[Tensor] = []
    for sight in sights:
        for seen, nothing in sight.by_slot():
            if any(seen is other for other in done):
                continue
            done.append(seen)
            shape = seen.shape[:-1]
            source, target, yes = (
                index if seen.dim() == 3 else index[:, :, None].expand(*shape, -1) for index in (old, new, moved)
            )
            value = seen.gather(-1, source)
            seen.scatter_(-1, source, torch.where(yes, torch.full_like(value, nothing), value))
            seen.scatter_(-1, target, torch.where(yes, value, seen.gather(-1, target)))
