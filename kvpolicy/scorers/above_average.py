"""above-average: whether a query pays a token its share of attention, or more.

Scissorhands (arXiv:2305.17118) calls a token important to a query that pays it more than 1 / n, n being the tokens that
the query sees, and keeps what is important to many of a window of queries. A share that is short of 1 / n by 2^-12 of
itself will do, so that rounding does not decide where all get the same.
"""

from __future__ import annotations

from torch import Tensor

from kvpolicy.plan import PoolPlan
from kvpolicy.scorers.registry import signal
from kvpolicy.scorers.sight import Leaf, Sight, masked_softmax

SHARE = 1 - 2**-12


@signal("above-average")
def above_average(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """How many of the scoring queries (or what part of them) pay the token its share; of a page, its best token's."""

    def reduce(logits: Tensor, some: slice) -> Tensor:
        if leaf.heads == "logits-max":
            logits = logits.amax(1, keepdim=True)
        seen = (~logits.isinf()).sum(-1, keepdim=True)
        return (masked_softmax(logits, None) * seen >= SHARE).float()

    return sight.state.page_max(pool, sight.summed(pool, leaf, reduce))
