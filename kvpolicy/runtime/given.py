"""Generated passes whose tokens are all known beforehand, taken at once: each layer goes through them by itself.

What a layer makes of a token depends on its own earlier tokens and on what the layer below made of this one, and on
nothing above or later. So the model is called once with all of the tokens, as with a prompt, and only attention goes
through them one by one, a layer at a time: its clocks stand at each token as they would have, and the policy decides
after each. What is kept, and what comes out, is what one pass after the other gives.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvpolicy.attention import Formula
from kvpolicy.runtime.moment import GIVEN


def attend_one_by_one(layer: Any, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
    """Attention [B, N, Q, D] of N generated passes: query [B, Q, N, D], key and value [B, K, N, D]."""
    moment, clocks = layer.moment, layer.clocks
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    tokens = [tensor.movedim(2, 0)[:, :, :, None].contiguous() for tensor in (query, key, value)]
    clocks.stand_at(moment.before)
    try:
        for number, kind in enumerate(moment.steps):
            moment.kind = kind
            clocks.advance()
            out[:, number] = layer.forward(*(tensor[number] for tensor in tokens), formula)[:, 0]
    finally:
        moment.kind = GIVEN
    return out
