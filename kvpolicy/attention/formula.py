"""What a model makes of q.k on the way to probabilities: scaled, perhaps capped, perhaps beside a sink."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Formula(NamedTuple):
    """How logits and their softmax are made in one attention layer.

    scaling: the factor of q.k.
    softcap: c makes the scaled logits c * tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2).
    sinks: [Q], a logit of each query head that stands in the softmax and belongs to no token (gpt-oss,
        arXiv:2508.10925, section 2.3), so that what the tokens get sums to less than 1.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the softmax of scaled products and nothing else, as ready-made kernels compute it."""
        return self.softcap is None and self.sinks is None

    @property
    def over_tokens(self) -> Formula:
        """The same without sinks: what a softmax over some tokens alone goes by."""
        return self._replace(sinks=None)

    def of_heads(self, query_heads: Tensor) -> Formula:
        """The same for some of the query heads, by number."""
        return self if self.sinks is None else self._replace(sinks=self.sinks.index_select(0, query_heads))

    def capped(self, logits: Tensor) -> Tensor:
        """Scaled float32 logits as the softmax gets them; masking comes afterwards."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def sink(self, kv_heads: int) -> Tensor | None:
        """The sinks in float32 by KV head [K, G]; None where there are none."""
        return None if self.sinks is None else self.sinks.float().view(kv_heads, -1)


def sink_softmax(logits: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax over the last dimension, beside a ``sink`` that takes its share (its last dimension is 1; broadcast).

    Where every logit is -inf, the result is 0 with a sink, and no number without.
    """
    if sink is None:
        return torch.softmax(logits, dim=-1)
    top = torch.maximum(logits.amax(-1, keepdim=True), sink)
    weights = torch.exp(logits - top)
    return weights / (weights.sum(-1, keepdim=True) + torch.exp(sink - top))
