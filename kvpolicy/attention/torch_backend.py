"""The readable backend: plain torch, any device, compiled by Inductor. It defines what other backends must compute.

Keys and values are stored once per KV head and never repeated: the G query heads of a KV head are a matrix dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Rows of a score tile are chosen so that a tile of the prompt's score matrix stays near this many numbers.
TILE_NUMBERS = 1 << 24


def scaled_logits(query: Tensor, keys: Tensor, hidden: Tensor, scaling: float) -> Tensor:
    """Scaled q.k of one query a row in float32, -inf where a slot is hidden.

    Shapes: query [B, K, G, D], keys [B, K, S, D], hidden [B, K, S] bool -> [B, K, G, S].
    """
    logits = torch.matmul(query * scaling, keys.transpose(2, 3)).float()
    return logits.masked_fill_(hidden[:, :, None], float("-inf"))


def attend_slots(
    query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one query a row over the slots, with what scorers read.

    Shapes as in ``scaled_logits``, values [B, K, S, D]. Returns output [B, K, G, D], and logits and probabilities
    [B, K, G, S] in float32; what nobody reads is never written by a compiled step.
    """
    logits = scaled_logits(query, keys, hidden, scaling)
    probabilities = torch.softmax(logits, dim=-1)
    return torch.matmul(probabilities.to(values.dtype), values), logits, probabilities


def attend_prompt(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    scaling: float,
) -> Tensor:
    """Causal attention of a prompt pass by position, in tiles of queries: never an N x S mask of the whole prompt.

    Shapes: query [B, Q, N, D], keys and values [B, K, S, D], query_position [B, N] (-1 for padding),
    key_position [B, K, S] (-1 for empty slots) -> [B, Q, N, D]. A padding query reads slot 0, so that its (unused)
    result stays finite.
    """
    group = query.shape[1] // keys.shape[1]
    first_slot = torch.arange(keys.shape[2], device=keys.device) == 0
    outputs = []
    for rows in _tiles(query, keys.shape[2]):
        position = query_position[:, None, rows, None]
        visible = (key_position[:, :, None] >= 0) & (key_position[:, :, None] <= position)
        visible = visible | ((position < 0) & first_slot)
        mask = visible[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
        tile = query[:, :, rows]
        outputs.append(F.scaled_dot_product_attention(tile, keys, values, mask, scale=scaling, enable_gqa=group > 1))
    return torch.cat(outputs, dim=2)


def column_sums(
    query: Tensor,
    keys: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    scaling: float,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Sum over the queries of a prompt pass of ``reduce(logits)``, in tiles: memory is O(tile x S), not O(N x S).

    ``reduce`` maps the masked float32 logits [B, K, G, n, S] of a tile to what is summed, [B, K, G', n, S]; padding
    queries are zeroed afterwards. Returns [B, K, G', S]. Shapes as in ``attend_prompt``.
    """
    grouped = rearrange(query, "b (k g) n d -> b k g n d", k=keys.shape[1]) * scaling
    total: Tensor | None = None
    for rows in _tiles(query, keys.shape[2]):
        position = query_position[:, None, None, rows, None]
        logits = torch.einsum("bkgnd,bksd->bkgns", grouped[:, :, :, rows], keys).float()
        seen = (key_position[:, :, None, None] >= 0) & (key_position[:, :, None, None] <= position)
        part = reduce(logits.masked_fill(~seen, float("-inf")))
        part = torch.where(position >= 0, part, 0.0).sum(dim=3)
        total = part if total is None else total + part
    assert total is not None
    return total


def _tiles(query: Tensor, slots: int) -> Iterator[slice]:
    count = query.shape[2]
    rows = max(16, TILE_NUMBERS // max(1, query.shape[0] * query.shape[1] * slots))
    for start in range(0, count, rows):
        yield slice(start, min(count, start + rows))
