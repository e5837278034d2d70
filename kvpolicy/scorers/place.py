"""recency, random: what a token is worth by its place alone."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.plan import PoolPlan
from kvpolicy.scorers.registry import signal
from kvpolicy.scorers.sight import Leaf, Sight

DRAWN_BITS = 24  # exact in float32


@signal("recency")
def recency(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """Position of the newest token of a unit (StreamingLLM arXiv:2309.17453: the oldest goes first)."""
    return sight.state.pool_positions(pool).amax(-1).float()


@signal("random")
def random(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """A number in [0, 1) drawn when the unit entered, see ``drawn``; drawn now for another pool, and for reading."""
    state = sight.state
    stored: Tensor | None = state.tensors.get(f"{pool.name}.drawn.{leaf.number}")
    if pool.name == leaf.pool and stored is not None:
        return stored
    place = state.unit_position(pool).long()
    return drawn(int(leaf.args.get("seed", 0)), state.layer, state.kv_heads[..., None], place)


def drawn(seed: int, layer: Tensor, heads: Tensor, position: Tensor) -> Tensor:
    """Hash of (seed, layer, KV head, position): the splitmix64 finaliser chained over the four, its top 24 bits / 2^24.

    All but the seed are int64 and broadcast; the same numbers on every device, in every order. The layer is a tensor,
    so that a graph that draws serves every layer.
    """
    seeded = _mix(torch.zeros_like(position), torch.full_like(position, seed))
    mixed = _mix(_mix(_mix(seeded, layer.expand_as(position)), heads.expand_as(position)), position)
    return ((mixed >> (64 - DRAWN_BITS)) & ((1 << DRAWN_BITS) - 1)).float() / (1 << DRAWN_BITS)


STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
GOLDEN = 0x9E3779B97F4A7C15


def _mix(before: Tensor, number: Tensor) -> Tensor:
    """One link of the chain on int64 tensors: they wrap around as unsigned ones do; shifts must be made logical."""
    z = before ^ (number + _signed(GOLDEN))
    for shift, factor in STEPS:
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return z


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
