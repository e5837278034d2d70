"""key-norm, value-norm, key-anchor, key-similarity: what a token is worth by what is stored of it, without any query.

key-norm (arXiv:2406.11430 keeps low norms: give it a negative weight) and value-norm are L2 norms; key-anchor
(KeyDiff, arXiv:2504.15364: evicts what lies nearest to the anchor: negative weight too) is the cosine of a key with the
mean of the L2-normalised resident keys of its pool and head; key-similarity (R-KV, arXiv:2505.24133) is its mean cosine
with all of them, copies of it that came before the newest left to count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy.plan import PoolPlan
from kvpolicy.scorers.registry import signal
from kvpolicy.scorers.sight import Leaf, Sight

AT_ONCE = 2**24
"""Cosines that are there at a time: all of a long prompt would take gigabytes."""


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


@signal("key-similarity")
def key_similarity(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
    """Redundancy: the mean over the pool's keys of their cosine with this one; of a page, its most redundant token's.

    In the row of each key the newest of those more alike than ``above`` counts nothing, so that of several copies the
    newest looks least redundant and stays. Where hits are ranked over the cache, its other tokens are compared too.
    O(S^2) time in the slots compared, some rows at a time.
    """
    state, span = sight.state, sight.state.span(pool)
    everything = leaf.ranks_cache
    position = state.position if everything else state.position[:, :, span]
    resident = position >= 0
    keys = sight.all_keys() if everything else sight.unit_keys(pool)
    directions = F.normalize(keys, dim=-1).masked_fill(~resident[..., None], 0.0)
    age = position.int()[:, :, None]
    total = torch.zeros(position.shape, device=keys.device)
    rows = max(1, AT_ONCE // position.numel())
    for start in range(0, position.shape[2], rows):
        cosines = torch.matmul(directions[:, :, start : start + rows], directions.transpose(2, 3))
        cosines.diagonal(offset=start, dim1=2, dim2=3).zero_()
        alike = (cosines > float(leaf.args["above"])) & resident[:, :, None]
        newest = torch.where(alike, age, -1).argmax(-1, keepdim=True)
        spared = cosines.gather(-1, newest).masked_fill(alike.gather(-1, newest), 0.0)
        total = total + cosines.scatter_(-1, newest, spared).sum(2)
    redundancy = total / resident.sum(-1, keepdim=True).clamp(min=1)
    return state.page_max(pool, redundancy[:, :, span] if everything else redundancy)
