"""attention, attention-logit: how much the scoring queries look at a token.

attention is the softmax probability (H2O arXiv:2306.14048 sums it over time; SCOPE arXiv:2412.13649 and TOVA
arXiv:2401.06104 read the current query's); attention-logit is the scaled q.k before any softmax.
"""

from __future__ import annotations

from torch import Tensor

from kvpolicy.plan import PoolPlan
from kvpolicy.scorers.registry import signal
from kvpolicy.scorers.sight import Leaf, Sight


@signal("attention")
def attention(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """Probability mass of the scoring queries; of a page, its best token's."""
    return sight.state.page_max(pool, sight.attention(pool, leaf))


@signal("attention-logit")
def attention_logit(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """Scaled q.k of the scoring queries; of a page, its best token's."""
    return sight.state.page_max(pool, sight.logits(pool, leaf))
