"""Memories: how a scorer's value of this pass joins what it saw before. Each starts at the unit's entry.

sum (H2O, arXiv:2306.14048), decay d: m <- d m + s, max-decay d: m <- max(d m, s) (G-KV, arXiv:2512.00504),
last-hit (RaaS, arXiv:2502.11147): the clock at the last hit, recurrence (LazyEviction, arXiv:2506.15969): last hit and
the longest gap between two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.scorers.sight import Leaf

CLOCKED = ("last-hit", "recurrence")


def fold(
    leaf: Leaf, memory: Tensor, gap: Tensor | None, score: Tensor, t: Tensor, active: Tensor | None = None
) -> None:
    """Fold this pass into ``memory`` [B, K, U] (and ``gap``) in place.

    ``score`` [B, K, U] is the pass's value (0 or 1 after ``hit``); ``t`` [B] the row's clock; units that are not
    ``active`` [B, K, U] stay as they are.
    """
    now = t[:, None, None].to(memory.dtype)
    if leaf.memory in CLOCKED:
        hit = score > 0 if active is None else (score > 0) & active
        if gap is not None:
            gap.copy_(torch.where(hit, torch.maximum(gap, now - memory), gap))
        memory.copy_(torch.where(hit, now, memory))
        return
    if leaf.memory == "sum":
        folded = memory + score
    elif leaf.memory == "decay":
        folded = memory * leaf.memory_value + score
    else:
        folded = torch.maximum(memory * leaf.memory_value, score)
    memory.copy_(folded if active is None else torch.where(active, folded, memory))


def recall(leaf: Leaf, memory: Tensor, gap: Tensor | None, t: Tensor) -> Tensor:
    """What the memory says now, float32 [B, K, U]."""
    if leaf.memory != "recurrence" or gap is None:
        return memory.float()
    since = (t[:, None, None] - memory).float()
    longest = gap.float()
    due = 2 * torch.sigmoid(-since / longest.clamp(min=1))
    often = torch.where(longest > 0, 2 * torch.sigmoid(-longest), 0.0)
    return due + leaf.memory_value * often
