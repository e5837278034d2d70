"""Moving units between slots that each KV head has for itself and slots that the heads of a row share.

In a prompt turn a shared pool lies in the turn's workspace as any other, head by head; when the turn has ended, what
its heads keep is written one after the other into the shared slots: heads in order, the units of a head by position.
Neither happens in a decode step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvpolicy.errors import CacheError
from kvpolicy.plan import PoolPlan
from kvpolicy.runtime.state import LayerState

OWN = ("keys", "values", "position", "owner", "size")


def pack_shared(old: LayerState, source: PoolPlan, new: LayerState, target: PoolPlan) -> None:
    """Write what is resident in a pool, shared or not, into empty shared slots of another state.

    Raises:
        CacheError: there is more than was planned.
    """
    page, place = target.page, old.unit_position(source)
    resident, heads = place >= 0, old.heads[..., None].long()
    count = resident.sum((1, 2))
    most = int(count.max()) if count.numel() else 0
    if most > target.units:
        raise CacheError(
            f"the heads of pool {target.name} keep {most * page} tokens together, but only {target.capacity} were "
            "planned; plan with the lengths that the cache will really see"
        )
    order = torch.where(resident, (heads << 32) + place, torch.iinfo(torch.int64).max).flatten(1).argsort(-1)[:, :most]
    head, unit = order // source.units, order % source.units
    slot = (unit[..., None] * page + torch.arange(page, device=unit.device)).flatten(1)
    owner = head.repeat_interleave(page, dim=1)
    width = slot.shape[1]
    for name in ("keys", "values"):
        if source.shared:
            lying = old.by_head(source, name)
        else:
            lying = old.tensors[name][:, :, old.span(source)]
        new.tensors[f"{target.name}.{name}"][:, :width] = lying[old.rows, owner, slot]
    real = torch.arange(width, device=unit.device) < count[:, None] * page
    position = torch.where(real, old.slot_positions(source)[old.rows, owner, slot], -1)
    new.tensors[f"{target.name}.position"][:, :width] = position
    new.tensors[f"{target.name}.owner"][:, :width] = torch.where(position >= 0, owner, -1).to(torch.int32)
    for name in _kept_about_units(new, target):
        room = new.tensors[f"{target.name}.{name}"]
        index, whose = (slot, owner) if room.shape[1] == target.capacity else (unit, head)
        room[:, : index.shape[1]] = old.by_head(source, name)[old.rows, whose, index]


def unpack_shared(old: LayerState, source: PoolPlan, wide: LayerState, target: PoolPlan) -> None:
    """Write shared slots into the front of the same pool of a state in which each head has slots for itself."""
    page, place = source.page, old.unit_position(source)
    row, head, unit = (place >= 0).nonzero(as_tuple=True)
    to = ((place >= 0).cumsum(-1) - 1)[row, head, unit]
    inside = torch.arange(page, device=unit.device)
    slot, to_slot = unit[:, None] * page + inside, to[:, None] * page + inside
    at = (row[:, None], head[:, None], target.offset + to_slot)
    for name in ("keys", "values", "position"):
        wide.tensors[name][at] = old.tensors[f"{source.name}.{name}"][row[:, None], slot]
    for name in _kept_about_units(old, source):
        kept, room = old.tensors[f"{source.name}.{name}"], wide.tensors[f"{source.name}.{name}"]
        if kept.shape[1] == source.capacity:
            room[row[:, None], head[:, None], to_slot] = kept[row[:, None], slot]
        else:
            room[row, head, to] = kept[row, unit]
    if source.size_read:
        wide.tensors[f"{source.name}.size"].copy_(old.tensors[f"{source.name}.size"])


def _kept_about_units(state: LayerState, pool: PoolPlan) -> Iterator[str]:
    """Names of what a shared pool keeps about its units, beside the tokens themselves."""
    for name in state.tensors:
        owner, _, what = name.partition(".")
        if owner == pool.name and what not in OWN:
            yield what
