"""Attention that is computed in parts, over slots that lie in several places, and put together afterwards.

A part is its output and the log-sum-exp of its logits: enough to weigh parts against each other exactly. Plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.attention.formula import Formula
from kvpolicy.attention.torch_backend import scaled_logits


def attend_part(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    """Attention of one query a row over some slots.

    Shapes: query [B, K, G, D], keys and values [B, K, S, D], hidden [B, K, S] -> output [B, K, G, D] and log-sum-exp
    float32 [B, K, G]. Where every slot is hidden they are 0 and -inf. Sinks are a part of their own: ``sink_part``.
    """
    logits = scaled_logits(query, keys, hidden, formula)
    log_sum = torch.logsumexp(logits, dim=-1)
    probabilities = torch.nan_to_num(torch.softmax(logits, dim=-1), nan=0.0)
    return torch.matmul(probabilities.to(values.dtype), values), log_sum


def sink_part(output: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Sinks [K, G] as one more part beside one whose output [B, K, G, D] is given: they bring nothing."""
    return torch.zeros_like(output), sink.expand(output.shape[:3])


def merge_parts(outputs: Sequence[Tensor], log_sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One part from several over different slots: what attention over all of their slots would have given.

    Shapes: outputs [B, K, G, D] and log-sum-exps [B, K, G], as of ``attend_part``, which also says what is returned.
    """
    by_part = torch.stack(list(log_sums))
    weights = torch.nan_to_num(torch.softmax(by_part, dim=0), nan=0.0)
    mixed = (torch.stack(list(outputs)).float() * weights[..., None]).sum(0)
    return mixed.to(outputs[0].dtype), torch.logsumexp(by_part, dim=0)
