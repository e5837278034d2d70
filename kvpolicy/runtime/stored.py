"""Pools stored in few bits: pages written as codes, and read as numbers again (KIVI, arXiv:2402.02750).

A page is written once, when it is complete; until then it waits at the model's precision in the pool's ``open`` page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpolicy.attention.quantised import Quantised, dequantise, quantise
from kvpolicy.plan import PoolPlan

if TYPE_CHECKING:
    from kvpolicy.runtime.state import LayerState

SIDES = ("keys", "values")


def dequantised(state: LayerState, pool: PoolPlan, side: str) -> Tensor:
    """What the codes of a stored pool stand for [B, K, U * page, D]."""
    assert pool.store is not None
    codes, scale, zero = (state.tensors[f"{pool.name}.{side}.{part}"] for part in ("codes", "scale", "zero"))
    by = pool.store.keys if side == "keys" else pool.store.values
    return dequantise(Quantised(codes, scale, zero, pool.store.bits, pool.store.group, by), state.keys.dtype)


def opened_up(state: LayerState, pool: PoolPlan, side: str, *, settled: bool) -> Tensor:
    """Keys or values of a stored pool as numbers [B, K, U * page, D]; those of its open page as they wait.

    ``settled``: between passes, when a page that is full has been stored. In a generated pass it is not yet.
    """
    numbers = dequantised(state, pool, side)
    if not pool.stages:
        return numbers
    unit = state.newest_unit(pool)
    slots = unit[..., None] * pool.page + torch.arange(pool.page, device=numbers.device)
    index = (state.rows[..., None], state.heads[..., None], slots)
    waiting = state.tensors[f"{pool.name}.{side}.open"]
    if settled or "generated" not in pool.admits:
        is_open = state.position[state.rows, state.heads, pool.offset + (unit + 1) * pool.page - 1] < 0
        waiting = torch.where(is_open[..., None, None], waiting, numbers[index])
    return numbers.index_put(index, waiting)


def write_pages(
    state: LayerState, pool: PoolPlan, units: Tensor, pages: dict[str, Tensor], present: Tensor, chosen: Tensor
) -> None:
    """Store pages of a pool under unit ids ``units`` [B, K, V], none twice, where ``chosen`` [B, K, V].

    ``pages`` holds "keys" and "values" [B, K, V, page, D]; slots that are not ``present`` [B, K, V, page] (pages fill
    from their first) play no part in the range of their group.
    """
    assert pool.store is not None
    store, page = pool.store, pool.page
    for side, by in (("keys", store.keys), ("values", store.values)):
        numbers = pages[side]
        if by == "channel":
            blocks = numbers.unflatten(3, (-1, store.group))
            inside = present.unflatten(3, (-1, store.group))[..., None]
            numbers = torch.where(inside, blocks, blocks[..., :1, :]).flatten(3, 4)
        scale = state.tensors[f"{pool.name}.{side}.scale"]
        made = quantise(numbers.flatten(2, 3), store.bits, store.group, by, scale.dtype)
        for part, fresh in (("codes", made.codes), ("scale", made.scale), ("zero", made.zero)):
            held = state.tensors[f"{pool.name}.{side}.{part}"]
            lines = page // store.group if by == "channel" and part != "codes" else page
            place = (units[..., None] * lines + torch.arange(lines, device=units.device)).flatten(2)
            index = (state.rows[..., None], state.heads[..., None], place)
            yes = chosen[..., None].expand(-1, -1, -1, lines).flatten(2)[..., None]
            held[index] = torch.where(yes, fresh, held[index])


def settle(state: LayerState, pool: PoolPlan) -> None:
    """After a generated pass: the page that it wrote to is stored in the rows where it is full now."""
    pages = {side: state.tensors[f"{pool.name}.{side}.open"][:, :, None] for side in SIDES}
    present = torch.ones(pages["keys"].shape[:4], dtype=torch.bool, device=state.position.device)
    unit = state.newest_unit(pool)[..., None]
    full = (state.clocks.streams[pool.stream].fill == pool.page)[:, None, None].expand_as(unit)
    write_pages(state, pool, unit, pages, present, full)


def store_all(state: LayerState, pool: PoolPlan, numbers: dict[str, Tensor], present: Tensor) -> None:
    """After a prompt turn: store the first V units, "keys" and "values" [B, K, V, page, D]; the newest waits if open.

    A page that is closed and not full waits as it would be read: it is rounded.
    """
    count = present[..., 0].sum(-1)
    units = torch.arange(present.shape[2], device=present.device).expand(*present.shape[:3])
    write_pages(state, pool, units, numbers, present, units < count[..., None])
    if not pool.stages:
        return
    newest = (count - 1).clamp(min=0)
    is_open = (state.clocks.streams[pool.stream].fill < pool.page)[:, None, None, None]
    for side in SIDES:
        read = dequantised(state, pool, side).unflatten(2, (pool.units, pool.page))[state.rows, state.heads, newest]
        own = numbers[side][state.rows, state.heads, newest]
        state.tensors[f"{pool.name}.{side}.open"].copy_(torch.where(is_open, own, read))
