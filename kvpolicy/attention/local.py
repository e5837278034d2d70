"""Attention of layers that look back over a few tokens only: any mask, whatever the formula. Plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kvpolicy.attention.formula import Formula, sink_softmax


def attend_visible(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, formula: Formula) -> Tensor:
    """Attention of each query over the tokens that it sees.

    Shapes: query [B, Q, N, D], keys and values [B, K, S, D], visible [B, N, S] bool -> [B, Q, N, D]. A query sees at
    least one token.
    """
    if formula.plain:
        grouped = query.shape[1] > keys.shape[1]
        mask = visible[:, None]
        return F.scaled_dot_product_attention(query, keys, values, mask, scale=formula.scaling, enable_gqa=grouped)
    heads = keys.shape[1]
    together = rearrange(query * formula.scaling, "b (k g) n d -> b k (g n) d", k=heads)
    logits = formula.capped(torch.matmul(together, keys.transpose(2, 3)).float())
    logits = rearrange(logits, "b k (g n) s -> b k g n s", n=query.shape[2])
    logits = logits.masked_fill(~visible[:, None, None], float("-inf"))
    sink = formula.sink(heads)
    probabilities = sink_softmax(logits, None if sink is None else sink[..., None, None]).to(values.dtype)
    mixed = torch.matmul(rearrange(probabilities, "b k g n s -> b k (g n) s"), values)
    return rearrange(mixed, "b k (g n) d -> b (k g) n d", n=query.shape[2])
