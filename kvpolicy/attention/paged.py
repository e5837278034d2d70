"""Attention over selected pages alone (Quest, arXiv:2406.10774). Plain torch: it defines ``kernels.pages``."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.attention.formula import Formula
from kvpolicy.attention.parts import attend_part


def attend_pages(
    query: Tensor, keys: Tensor, values: Tensor, position: Tensor, index: Tensor, page: int, formula: Formula
) -> tuple[Tensor, Tensor]:
    """Attention of one query a row over the pages that ``index`` names; here they are gathered first.

    Args:
        query: [B, K, G, D]; ``keys`` and ``values`` [B, K, S, D]; ``position`` [B, K, S], -1 where a slot is empty.
        index: int32 [B, K, P], numbers of pages of ``page`` neighbouring slots, in any order, none twice; -1 for none.

    Returns:
        The output and the log-sum-exp, as ``parts.attend_part``: 0 and -inf where no page is named.
    """
    inside = torch.arange(page, device=index.device)
    slots = (index.long()[..., None] * page + inside).flatten(2)
    named = (index >= 0)[..., None].expand(-1, -1, -1, page).flatten(2)
    slots = torch.where(named, slots, 0)
    rows = slots[..., None].expand(-1, -1, -1, keys.shape[3])
    hidden = ~named | (position.gather(2, slots) < 0)
    return attend_part(query, keys.gather(2, rows), values.gather(2, rows), hidden, formula)
