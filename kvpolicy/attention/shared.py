"""Attention over slots that the KV heads of a row share: each slot holds one token of one head, its owner.

What heads keep under one budget (Ada-KV, arXiv:2407.11550) differs in length from head to head and row to row. Rows of
the longest head's length would waste what the others leave, and lists cut to length have shapes that follow the data,
which no compiled step can have. So a row has one list of T slots for all its heads, and all query heads look at all of
it, with a mask that leaves each its own head's tokens. Every key and value is then read once, as few bytes as there
are; the products that the mask throws away cost arithmetic, of which a decode step has plenty: it waits for memory.

Plain torch: one matrix product of all Q query heads with the keys of a row, and one with its values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.attention.formula import Formula


def shared_logits(query: Tensor, keys: Tensor, owner: Tensor, formula: Formula) -> Tensor:
    """Scaled q.k in float32, -inf where a slot is empty or another head's.

    Shapes: query [B, K, G, D], keys [B, T, D], owner [B, T] (a KV head, -1 for an empty slot) -> [B, K, G, T].
    """
    logits = formula.capped(torch.matmul((query * formula.scaling).flatten(1, 2), keys.transpose(1, 2)).float())
    heads = torch.arange(query.shape[1], device=owner.device)
    foreign = owner[:, None] != heads[:, None]
    return logits.unflatten(1, query.shape[1:3]).masked_fill_(foreign[:, :, None], float("-inf"))


def mix_shared(probabilities: Tensor, values: Tensor) -> Tensor:
    """Probabilities [B, K, G, T] of shared slots and their values [B, T, D] -> [B, K, G, D]."""
    mixed = torch.matmul(probabilities.flatten(1, 2).to(values.dtype), values)
    return mixed.unflatten(1, probabilities.shape[1:3])


def attend_shared(
    query: Tensor, keys: Tensor, values: Tensor, owner: Tensor, formula: Formula
) -> tuple[Tensor, Tensor]:
    """One part of attention, as of ``parts.attend_part``: output [B, K, G, D] and log-sum-exp float32 [B, K, G].

    Shapes as in ``shared_logits``, values [B, T, D]. A head that owns no slot has 0 and -inf.
    """
    logits = shared_logits(query, keys, owner, formula)
    probabilities = torch.nan_to_num(torch.softmax(logits, dim=-1), nan=0.0)
    return mix_shared(probabilities, values), torch.logsumexp(logits, dim=-1)
