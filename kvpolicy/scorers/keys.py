"""key-norm, value-norm, key-anchor: what a token is worth by what is stored of it, without any query.

key-norm (arXiv:2406.11430 keeps low norms: give it a negative weight) and value-norm are L2 norms; key-anchor
(KeyDiff, arXiv:2504.15364: evicts what lies nearest to the anchor: negative weight too) is the cosine of a key with the
mean of the L2-normalised resident keys of its pool and head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kvpolicy.plan import PoolPlan
from kvpolicy.scorers.registry import signal
from kvpolicy.scorers.sight import Leaf, Sight


@signal("key-norm")
def key_norm(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """L2 norm of the key; of a page, its largest."""
    return sight.state.page_max(pool, sight.unit_keys(pool).norm(dim=-1))


@signal("value-norm")
def value_norm(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """L2 norm of the value; of a page, its largest."""
    return sight.state.page_max(pool, sight.unit_values(pool).norm(dim=-1))


@signal("key-anchor")
def key_anchor(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """Cosine of each key with the mean direction of the resident keys, whose length plays no part."""
    own = sight.state.pools[leaf.pool]  # the anchor is of the scorer's pool, whichever pool's units are ranked
    resident = sight.state.position[:, :, sight.state.span(own), None] >= 0
    anchor = F.normalize(sight.unit_keys(own), dim=-1).masked_fill(~resident, 0.0).sum(2, keepdim=True)
    directions = F.normalize(sight.unit_keys(pool), dim=-1)
    return sight.state.page_max(pool, (directions * F.normalize(anchor, dim=-1)).sum(-1))
