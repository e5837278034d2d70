"""The readable backend: plain torch, any device, compiled by Inductor. It defines what other backends must compute.

Keys and values are stored once per KV head and never repeated: the G query heads of a KV head are a matrix dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.attention.formula import Formula, sink_softmax


def scaled_logits(query: Tensor, keys: Tensor, hidden: Tensor, formula: Formula) -> Tensor:
    """Scaled q.k of one query a row in float32, capped where the model does so, -inf where a slot is hidden.

    Shapes: query [B, K, G, D], keys [B, K, S, D], hidden [B, K, S] bool -> [B, K, G, S].
    """
    logits = formula.capped(torch.matmul(query * formula.scaling, keys.transpose(2, 3)).float())
    return logits.masked_fill_(hidden[:, :, None], float("-inf"))


def attend_slots(
    query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, formula: Formula
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one query a row over the slots, with what scorers read.

    Shapes as in ``scaled_logits``, values [B, K, S, D]. Returns output [B, K, G, D], and logits and probabilities
    [B, K, G, S] in float32; what nobody reads is never written by a compiled step.
    """
    logits = scaled_logits(query, keys, hidden, formula)
    probabilities = attention_probabilities(logits, formula)
    return torch.matmul(probabilities.to(values.dtype), values), logits, probabilities


def attention_probabilities(logits: Tensor, formula: Formula) -> Tensor:
    """What a query pays to each slot, from its masked logits: both [B, K, G, S]; a sink takes its share."""
    sink = formula.sink(logits.shape[1])
    return sink_softmax(logits, None if sink is None else sink[..., None])
