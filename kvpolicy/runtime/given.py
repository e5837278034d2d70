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
from kvpolicy.runtime.ahead import AT_ONCE
from kvpolicy.runtime.compiling import TokenSteps
from kvpolicy.runtime.moment import GIVEN


def attend_one_by_one(layer: Any, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
    """Attention [B, N, Q, D] of N generated passes: query [B, Q, N, D], key and value [B, K, N, D]."""
    moment, clocks = layer.moment, layer.clocks
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    tokens = [tensor.movedim(2, 0)[:, :, :, None].contiguous().unbind() for tensor in (query, key, value)]
    clocks.stand_at(moment.before)
    layer.steps = None if moment.compiler is None else TokenSteps(moment.compiler)
    try:
        for start in range(0, len(moment.steps), AT_ONCE):
            near = slice(start, start + AT_ONCE)
            ahead = layer.ahead = layer.look_ahead(query[:, :, near], key[:, :, near], formula)
            for number, kind in enumerate(moment.steps[near], start):
                moment.kind = kind
                clocks.advance()
                if ahead is not None:
                    ahead.come_to(number - start)
                said = layer.forward(*(each[number] for each in tokens), formula)
                if ahead is None:
                    out[:, number] = said[:, 0]
                else:
                    ahead.leave()
            if ahead is not None:
                out[:, near] = ahead.attended()
    finally:
        layer.steps = layer.ahead = None
        moment.kind = GIVEN
    return out
