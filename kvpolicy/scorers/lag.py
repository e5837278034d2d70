"""lag: how unevenly a token's key and value lie in the ranges of the next block of the text, as a rank in its own.

LagKV (arXiv:2504.04704) reads no attention. Each channel of a block of ``lag`` positions is scaled by its least and
greatest number in the block that follows; a token's score is the standard deviation of its scaled channels, softmax
over its block, keys and values averaged. Only the rank within the block counts: 0 for the best, then -1 / lag, ...; 1
for tokens of blocks that no whole one follows. Blocks go by position, so a block that was thinned out stays one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.plan import PoolPlan
from kvpolicy.scorers.registry import signal
from kvpolicy.scorers.sight import Leaf, Sight

NOWHERE = torch.iinfo(torch.int64).max


@signal("lag")
def lag(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """Rank within the block; of a page, its best token's. Where hits are ranked over the cache, all tokens count."""
    state, span = sight.state, sight.state.span(pool)
    everything = leaf.ranks_cache
    keys = sight.all_keys() if everything else sight.unit_keys(pool)
    parts = sorted(state.plan.pools, key=lambda part: part.offset) if everything else [pool]
    values = torch.cat([sight.unit_values(part) for part in parts], dim=2)
    position = (state.position if everything else state.position[:, :, span]).long()
    ranks = block_ranks(keys, values, position, int(leaf.args["lag"]), int(leaf.args["after"]))
    return state.page_max(pool, ranks[:, :, span] if everything else ranks)


def block_ranks(keys: Tensor, values: Tensor, position: Tensor, size: int, after: int) -> Tensor:
    """Shapes: keys, values float32 [B, K, S, D], position int64 [B, K, S] (-1: empty) -> float32 [B, K, S].

    Positions have no bound, and slots no order: blocks are numbered anew by those that have tokens left, S at most.
    """
    held = position >= after
    order = torch.where(held, position, NOWHERE).argsort(-1)
    block = torch.where(held, (position - after) // size, -9)
    line = block.gather(-1, order)
    starts = torch.cat([torch.zeros_like(line[..., :1]), (line[..., 1:] != line[..., :-1]).long()], dim=-1)
    number = torch.empty_like(block).scatter_(-1, order, starts.cumsum(-1))
    of_number = torch.full_like(_room_for_one_more(block), -9).scatter_(-1, number, block)
    newest = position.amax(-1, keepdim=True)
    whole = newest >= after + (block + 2) * size - 1
    judged = held & whole & (of_number.gather(-1, number + 1) == block + 1)
    score = (_weights(keys, number, judged) + _weights(values, number, judged)) / 2
    # Worst first, block by block; of equals the newer is the better.
    by_score = order.gather(-1, score.gather(-1, order).argsort(dim=-1, stable=True))
    by_block = by_score.gather(-1, number.gather(-1, by_score).argsort(dim=-1, stable=True))
    steps = torch.arange(position.shape[-1], device=position.device).expand_as(position)
    place = torch.empty_like(number).scatter_(-1, by_block, steps)
    ends = torch.zeros_like(_room_for_one_more(block)).scatter_add_(-1, number, torch.ones_like(number)).cumsum(-1)
    better = ends.gather(-1, number) - 1 - place
    return torch.where(judged, -better.float() / size, 1.0)


def _weights(vectors: Tensor, number: Tensor, judged: Tensor) -> Tensor:
    """Softmax over each block of how vectors spread when scaled by the next block's ranges [B, K, S]."""
    low, high = (_extremes(vectors, number, how) for how in ("amin", "amax"))
    scaled = (vectors - low) / torch.where(high > low, high - low, 1.0)
    centred = scaled - scaled.mean(-1, keepdim=True)
    spread = (centred.square().sum(-1) / max(1, vectors.shape[-1] - 1)).sqrt()
    spread = torch.where(judged, spread, 0.0)
    most = torch.zeros_like(_room_for_one_more(spread)).scatter_reduce_(-1, number, spread, "amax")
    weights = torch.exp(spread - most.gather(-1, number))
    total = torch.zeros_like(most).scatter_add_(-1, number, weights)
    return weights / total.gather(-1, number)


def _extremes(vectors: Tensor, number: Tensor, how: str) -> Tensor:
    """The least or greatest number of each channel in the block after a token's own [B, K, S, D]."""
    rows, heads, slots, channels = vectors.shape
    start = float("inf") if how == "amin" else float("-inf")
    extremes = vectors.new_full((rows, heads, slots + 1, channels), start)
    extremes.scatter_reduce_(2, number[..., None].expand_as(vectors), vectors, how)
    return extremes.gather(2, (number + 1)[..., None].expand_as(vectors))


def _room_for_one_more(by_slot: Tensor) -> Tensor:
    return torch.cat([by_slot, by_slot[..., :1]], dim=-1)
