"""Step 5 on tensors: the lowest-keyed candidates leave, and their units go back to the ring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from kvpolicy.plan import PoolPlan
from kvpolicy.runtime.across_heads import stay_across_heads
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.pool import LAST_KEY, PoolPolicy, order_keys
from kvpolicy.runtime.quantities import Whole, floored
from kvpolicy.runtime.state import LayerState

# Told which units [B, K, V] leave a pool, and which of them really do [B, K, V], before their slots are emptied.
Leave = Callable[[Tensor, Tensor], None]


def excess_units(policy: PoolPolicy, page: int, count: Tensor, values: Mapping[str, Whole]) -> Tensor:
    """How many units the budget asks to go [B, K], protection left aside; ``count`` [B, K] units are resident.

    None are asked where it is not above 0; more than there are, where the budget is below 0.
    """
    assert policy.budget is not None
    budget = floored(policy.budget, values)
    return count - budget if page == 1 else (count * page - budget + page - 1) // page


def drop_keys(pool: PoolPlan, state: LayerState, score: Tensor, candidate: Tensor) -> Tensor:
    """The order in which units may go, lowest first [B, K, U]; LAST_KEY where a unit may not."""
    if pool.scope == "layer":
        score = state.ranks.gather(score).mean(1, keepdim=True).expand_as(score)
    return order_keys(score, state.unit_position(pool), candidate, LAST_KEY)


def fires(pool: PoolPlan, clocks: Clocks) -> Tensor | None:
    """Rows whose cadence fires at this generated pass [B]; None where all do."""
    return None if pool.cadence == 1 else clocks.t % pool.cadence == 0


def drop_some(
    policy: PoolPolicy,
    state: LayerState,
    clocks: Clocks,
    values: Mapping[str, Whole],
    score: Tensor,
    candidate: Tensor,
    leave: Leave | None = None,
) -> None:
    """One update of a generated pass: empty the slots of the victims and push their units, nothing else moves.

    ``leave`` is told of them first, where another pool takes them.
    """
    pool = state.pools[policy.name]
    count = state.count(pool)
    peak = state.tensors[f"{pool.name}.peak"]
    peak.copy_(torch.maximum(peak, count if pool.page == 1 else count * pool.page))
    excess, due = excess_units(policy, pool.page, count, values), fires(pool, clocks)
    if due is not None:
        excess = torch.where(due[:, None], excess, 0)
    keys = drop_keys(pool, state, score, candidate)
    most = min(pool.victims or pool.units, pool.units)
    if pool.to is not None:  # no more can ever move than there is room for
        most = min(most, state.pools[pool.to].units)
    if most == 1:
        victim = keys.argmin(-1, keepdim=True)
        gone = candidate.gather(-1, victim) & (excess > 0)[..., None]
    else:
        key, victim = keys.topk(most, dim=-1, largest=False, sorted=True)
        steps = torch.arange(most, device=key.device)
        gone = (steps < excess[..., None]) & (key < LAST_KEY)
    if leave is not None:
        leave(victim, gone)
    _empty(pool, state, victim, gone)
    if pool.pin_survivors:
        _mark_survivors(pool, state, due)


def _stay_across_ranks(state: LayerState, keys: Tensor, room: Tensor, floor: Fraction) -> Tensor:
    """How many candidates stay in each head that lies here [B, K], of ``keys`` [B, K, U] and ``room`` [B, K] here."""
    every = state.ranks.gather(torch.cat([keys, room[..., None]], dim=-1))
    keys, room = every[..., :-1], every[..., -1]
    return state.ranks.here(stay_across_heads(keys, keys < LAST_KEY, room, floor))


def record_size(pool: PoolPlan, state: LayerState, clocks: Clocks) -> None:
    """After a pool's update in a generated pass: what size(pool) reads from now on."""
    size = state.tensors[f"{pool.name}.size"]
    now, due = state.count(pool) * pool.page, fires(pool, clocks)
    size.copy_(now if due is None else torch.where(due[:, None], now, size))


def _empty(pool: PoolPlan, state: LayerState, victim: Tensor, gone: Tensor) -> None:
    """Mark the victims' slots empty and hand their units back. Shapes [B, K, V]."""
    rows, heads = state.rows[..., None], state.heads[..., None]
    if pool.page == 1:
        place, emptied = (rows, heads, victim + pool.offset), gone
    else:
        slots = pool.offset + victim[..., None] * pool.page + torch.arange(pool.page, device=victim.device)
        place, emptied = (rows[..., None], heads[..., None], slots), gone[..., None]
    state.position[place] = state.position[place].masked_fill_(emptied, -1)
    ring, tail = state.tensors[f"{pool.name}.ring"], state.tensors[f"{pool.name}.tail"]
    index = tail[..., None]
    if victim.shape[-1] > 1:
        index = index + torch.arange(victim.shape[-1], device=victim.device)
    freed = (rows, heads, index % pool.units)
    ring[freed] = torch.where(gone, victim.to(ring.dtype), ring[freed])
    tail += gone.sum(-1)


def _mark_survivors(pool: PoolPlan, state: LayerState, due: Tensor | None) -> None:
    survivor = state.tensors[f"{pool.name}.survivor"]
    now = state.resident_units(pool)
    survivor.copy_(now if due is None else torch.where(due[:, None, None], now, survivor))


def drop_all_at_once(
    policy: PoolPolicy,
    state: LayerState,
    values: Mapping[str, Whole],
    score: Tensor,
    candidate: Tensor,
    spoken: Tensor,
    leave: Leave | None = None,
) -> None:
    """The update that ends a prompt turn, on the turn's workspace: any number of units go; rings are laid later.

    Rows that brought no token to the turn, not ``spoken`` [B], are not updated.
    """
    pool = state.pools[policy.name]
    excess = excess_units(policy, pool.page, state.resident_units(pool).sum(-1), values)
    keys = drop_keys(pool, state, score, candidate)
    if pool.scope == "across-heads":
        room = policy.may_stay(state, candidate, values).clamp(min=0)
        excess = candidate.sum(-1) - _stay_across_ranks(state, keys, room, pool.floor)
    excess = torch.where(spoken[:, None], excess, 0)
    rank = keys.argsort(-1).argsort(-1)
    gone = (rank < excess[..., None]) & candidate
    if leave is not None:
        leave(torch.arange(pool.units, device=gone.device).expand_as(gone), gone)
    slots = state.position[:, :, state.span(pool)]
    slots.masked_fill_(gone[..., None].expand(-1, -1, -1, pool.page).flatten(2), -1)
    if pool.pin_survivors:
        _mark_survivors(pool, state, spoken)
