"""Which candidates stay where the KV heads of a row compete for room (Ada-KV, arXiv:2407.11550, algorithm 1).

All heads' candidates are ranked together, by score, then position, then head; the best take all heads' room. A head
then keeps ``round((1 - floor) * its winners + floor * its own room)`` of its best.
"""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor


def stay_across_heads(keys: Tensor, candidate: Tensor, room: Tensor, floor: Fraction) -> Tensor:
    """How many candidates stay in each head, int64 [B, K].

    Args:
        keys: the total order of units within a head, int64 [B, K, U], lowest first; all that are no candidates are
            above those that are.
        candidate: [B, K, U].
        room: candidates that fit each head's own budget beside what is protected, at least 0 [B, K].
    """
    ordered = keys.flatten(1).argsort(dim=-1, stable=True)  # of equal keys, the lower head first
    rank = ordered.argsort(-1).unflatten(1, keys.shape[1:])
    losers = candidate.sum((1, 2)) - room.sum(1)
    wins = (candidate & (rank >= losers[:, None, None])).sum(-1)
    share, whole = floor.numerator, floor.denominator
    mixed = (whole - share) * wins + share * room
    return (2 * mixed + whole) // (2 * whole)  # half up
