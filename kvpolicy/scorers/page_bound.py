"""page-bound: the most that any key of a page could answer the query.

Quest (arXiv:2406.10774) keeps the channel-wise minimum and maximum of a page's keys; the bound is
sum_d max(q_d * min_d, q_d * max_d), here times the attention scale, so that it bounds attention-logit from above.
RaaS (arXiv:2502.11147) ranks pages by it. A page of one token is bounded by its own logit.
"""

from __future__ import annotations

from torch import Tensor

from kvpolicy.plan import PoolPlan
from kvpolicy.scorers.registry import signal
from kvpolicy.scorers.sight import Leaf, Sight


@signal("page-bound")
def page_bound(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """Upper bound of the scaled q.k of each page."""
    return sight.bounds(pool, leaf)
