"""The readable backend's prompt passes: attention by position, and what all queries of a pass say of each slot.

Everything goes by tiles of queries, so that memory is O(tile x S) and never O(N x S).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kvpolicy.attention.formula import Formula, sink_softmax

MASK_NUMBERS = 1 << 24  # in the mask of a tile of queries
# Numbers in a tile of scores, and at most so many queries. On a CPU each thread's share of a tile must stay in its
# cache, and half of what is computed on the diagonal is hidden; elsewhere few launches matter more.
TILES_PER_THREAD = {"cpu": (5 << 18, 32)}
TILES_ELSEWHERE = (1 << 24, 1024)

Reduce = Callable[[Tensor, slice], Tensor]


def attend_prompt(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    formula: Formula,
) -> Tensor:
    """Causal attention of a prompt pass by position.

    Shapes: query [B, Q, N, D], keys and values [B, K, S, D], query_position [B, N] (-1 for padding),
    key_position [B, K, S] (-1 for empty slots) -> [B, Q, N, D]. A padding query reads slot 0, so that its (unused)
    result stays finite.
    """
    if not formula.plain:  # no ready-made kernel computes it
        given = (query, keys, values, query_position, key_position, formula)
        return attend_prompt_and_sum(*given, in_order=False, padded=True)[0]
    group = query.shape[1] // keys.shape[1]
    first_slot = torch.arange(keys.shape[2], device=keys.device) == 0
    rows = max(16, MASK_NUMBERS // max(1, query.shape[0] * query.shape[1] * keys.shape[2]))
    outputs = []
    for tile in _slices(query.shape[2], rows):
        position = query_position[:, None, tile, None]
        visible = (key_position[:, :, None] >= 0) & (key_position[:, :, None] <= position)
        visible = visible | ((position < 0) & first_slot)
        mask = visible[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
        queries = query[:, :, tile]
        outputs.append(
            F.scaled_dot_product_attention(queries, keys, values, mask, scale=formula.scaling, enable_gqa=group > 1)
        )
    return torch.cat(outputs, dim=2)


def attend_prompt_and_sum(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    formula: Formula,
    *,
    in_order: bool,
    padded: bool,
) -> tuple[Tensor, Tensor]:
    """The same attention together with its column sums: what all queries of the pass paid to each slot.

    One pass over the scores gives both, for little more than attention alone. Shapes as in ``attend_prompt``; returns
    the output [B, Q, N, D] (0 for padding) and the summed probabilities [B, K, G, S] in float32.

    Args:
        in_order: the slots are the queries' own columns, in order (later by what a row is padded on its left): column n
            sees nothing behind slot n.
        padded: some query is padding. Without any, ``in_order`` slots need no mask but on the diagonal.
    """
    rows, heads, slots = key_position.shape
    out = query.new_empty(rows * heads, query.shape[1] // heads, query.shape[2], values.shape[-1])
    sums = torch.zeros(rows * heads, out.shape[1], slots, device=query.device)
    stored = values.flatten(0, 1)
    for some, tile, logits in _score_tiles(query, keys, query_position, key_position, formula, in_order, padded):
        if formula.sinks is None:
            probabilities = torch.softmax(logits, dim=-1, out=logits)
        else:
            probabilities = sink_softmax(logits, sinks_of(formula, rows, heads)[some])
        if padded:
            probabilities.nan_to_num_()
        seen, by_query = logits.shape[-1], probabilities.flatten(0, 1)
        mixed = torch.bmm(probabilities.flatten(1, 2).to(values.dtype), stored[some, :seen])
        out[some, :, tile] = mixed.unflatten(1, logits.shape[1:3])
        ones = by_query.new_ones(len(by_query), 1, by_query.shape[1])
        sums[some, :, :seen] += torch.bmm(ones, by_query).view(*logits.shape[:2], seen)
    return out.view(*query.shape[:3], -1), sums.view(rows, heads, -1, slots)


def sinks_of(formula: Formula, rows: int, kv_heads: int) -> Tensor:
    """The sinks of all rows and KV heads, beside a tile of scores [B * K, G, 1, 1]."""
    sink = formula.sink(kv_heads)
    assert sink is not None
    return sink.repeat(rows, 1)[:, :, None, None]


def column_sums(
    query: Tensor,
    keys: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    formula: Formula,
    reduce: Reduce,
) -> Tensor:
    """Sum over the queries of a prompt pass of ``reduce(logits, some)``, whatever that is.

    ``reduce`` maps the masked float32 logits [H, G, n, S] of a tile to what is summed, [H, G', n, S]; ``some`` says
    which H of all rows and KV heads [B * K] they belong to. Padding queries are zeroed afterwards. Returns
    [B, K, G', S]. Shapes as in ``attend_prompt``.
    """
    rows, heads, slots = key_position.shape
    active = (query_position >= 0).repeat_interleave(heads, 0)[:, None, :, None]
    total: Tensor | None = None
    for some, tile, logits in _score_tiles(query, keys, query_position, key_position, formula, False, True):
        part = torch.where(active[some, :, tile], reduce(logits, some), 0.0).sum(dim=2)
        if total is None:
            total = part.new_zeros(rows * heads, *part.shape[1:])
        total[some] += part
    assert total is not None
    return total.view(rows, heads, -1, slots)


def _score_tiles(
    query: Tensor,
    keys: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    formula: Formula,
    in_order: bool,
    padded: bool,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of the masked float32 scores: which of the B * K heads, which columns, logits [H, G, n, seen slots]."""
    rows, heads, slots = key_position.shape
    grouped = rearrange(query * formula.scaling, "b (k g) n d -> (b k) g n d", k=heads)
    transposed = rearrange(keys, "b k s d -> (b k) d s").contiguous()
    group, columns = grouped.shape[1:3]
    numbers, widest = _tile_size(query.device)
    width = min(columns, widest, max(16, numbers // max(1, group * slots) // 16 * 16))
    together = min(rows * heads, max(1, numbers // max(1, group * slots * width)))
    room = grouped.new_empty(together * group * width * slots)  # one for all tiles: fresh memory costs its first touch
    later = torch.full((width, width), float("-inf"), device=query.device).triu(1)
    for some in _slices(rows * heads, together):
        placed = key_position.flatten(0, 1)[some, None, :]
        position = query_position.repeat_interleave(heads, 0)[some, :, None]
        for tile in _slices(columns, width):
            seen = min(tile.stop, slots) if in_order else slots
            queries = grouped[some, :, tile].flatten(1, 2)
            scores = room[: queries.shape[0] * queries.shape[1] * seen].view(*queries.shape[:2], seen)
            torch.bmm(queries, transposed[some, :, :seen], out=scores)
            logits = formula.capped(scores.float().unflatten(1, (group, -1)))
            if in_order and not padded:
                corner = logits[..., tile.start : seen]
                corner += later[: corner.shape[-2], : corner.shape[-1]]
            else:
                hidden = (placed[..., :seen] < 0) | (placed[..., :seen] > position[:, tile])
                logits.masked_fill_(hidden[:, None], float("-inf"))
            yield some, tile, logits


def _tile_size(device: torch.device) -> tuple[int, int]:
    if device.type not in TILES_PER_THREAD:
        return TILES_ELSEWHERE
    numbers, widest = TILES_PER_THREAD[device.type]
    return numbers * torch.get_num_threads(), widest * torch.get_num_threads()


def _slices(count: int, width: int) -> Iterator[slice]:
    for start in range(0, count, width):
        yield slice(start, min(count, start + width))
