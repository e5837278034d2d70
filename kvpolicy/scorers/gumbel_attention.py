"""gumbel-attention: softmax of the scaled logits with Gumbel noise, at a temperature that grows with t.

Keyformer (arXiv:2403.09054) scores with softmax((logit + noise) / temperature): noise keeps the ranking from hardening
around the tokens that happened to be looked at first, and the temperature flattens it as more tokens are gone. The
noise of a token is drawn once, from (seed, layer, KV head, position) by the hash of ``random``, and serves all query
heads of its KV head. -log(-log(u)) with u an odd multiple of 2^-24: never 0 or 1, and exact in float32, as 1 - u is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.plan import PoolPlan
from kvpolicy.scorers.place import DRAWN_BITS, drawn
from kvpolicy.scorers.registry import signal
from kvpolicy.scorers.sight import Leaf, Sight, masked_softmax


@signal("gumbel-attention")
def gumbel_attention(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """Noisy attention mass of the scoring queries; of a page, its best token's."""
    state = sight.state
    noise = gumbel(int(leaf.args["seed"]), state.layer, state.kv_heads[..., None], state.all_positions.long())
    noise = noise.flatten(0, 1)
    growing = float(leaf.args["growth"]) * state.clocks.t[:, None].float()
    temperature = (float(leaf.args["temperature"]) + growing).expand(state.position.shape[:2]).flatten()

    def reduce(logits: Tensor, some: slice) -> Tensor:
        noisy = (logits + noise[some, None, None]) / temperature[some, None, None, None]
        return masked_softmax(noisy.amax(1, keepdim=True) if leaf.heads == "logits-max" else noisy, None)

    return state.page_max(pool, sight.summed(pool, leaf, reduce))


def gumbel(seed: int, layer: Tensor, heads: Tensor, position: Tensor) -> Tensor:
    """A Gumbel number for each token, from the 24 bits of ``drawn`` with the last one set; float32."""
    bits = (drawn(seed, layer, heads, position) * (1 << DRAWN_BITS)).long() | 1
    return -torch.log(-torch.log1p(-bits.float() / (1 << DRAWN_BITS)))
