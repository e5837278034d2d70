"""What the queries of a prompt pass say of each slot, heads reduced; and which of them are the newest.

Plain torch, in tiles: it defines what ``kernels.prompt`` must compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.attention.formula import Formula, sink_softmax
from kvpolicy.attention.torch_prompt import column_sums, sinks_of

SIGNALS = ("attention", "logits")
HEADS = ("each", "mean", "max", "sum", "logits-max")


def prompt_scores(
    query: Tensor,
    keys: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    formula: Formula,
    signal: str,
    heads: str,
) -> Tensor:
    """Sum over the queries of their probabilities (``attention``) or scaled q.k (``logits``), then heads reduced.

    Shapes: query [B, Q, N, D], keys [B, K, S, D], query_position [B, N] (-1 for padding), key_position [B, K, S] (-1
    for a slot that is empty, or outside of what the softmax is taken over) -> float32 [B, K, 1, S], and [B, K, G, S]
    for heads ``each``. A query sees the slots at its own position and before. ``logits-max`` takes the maximum over
    heads before the softmax, which then has no sink, and for ``logits`` after the sum, as ``max`` does.
    """

    sinks = None if formula.sinks is None else sinks_of(formula, *key_position.shape[:2])

    def reduce(logits: Tensor, some: slice) -> Tensor:
        if signal == "logits":
            return torch.where(logits.isinf(), 0.0, logits)
        if heads == "logits-max":
            return torch.nan_to_num(torch.softmax(logits.amax(1, keepdim=True), dim=-1), nan=0.0)
        return torch.nan_to_num(sink_softmax(logits, None if sinks is None else sinks[some]), nan=0.0)

    summed = column_sums(query, keys, query_position, key_position, formula, reduce)
    return summed if heads == "each" else reduce_heads(summed, heads)[:, :, None]


def reduce_heads(by_head: Tensor, how: str) -> Tensor:
    """Reduce the G query heads of a KV head (dimension 2)."""
    if how == "max" or how == "logits-max":
        return by_head.amax(2)
    return by_head.sum(2) if how == "sum" else by_head.mean(2)


def newest_queries(query: Tensor, query_position: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """The newest ``last`` queries of each row, [B, Q, w, D], and their positions [B, w], in any order.

    A row with fewer has -1 for the rest; w is ``last``, or N where the pass is shorter.
    """
    width = min(last, query_position.shape[1])
    position, columns = query_position.topk(width, dim=1)
    index = columns[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index), position
