"""``positions: compact``: in each pass keys and queries stand at their rank among what is resident (StreamingLLM,
arXiv:2309.17453). In the slots keys keep the rotation of their own position."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from kvpolicy.attention.rotation import Rotation, turn

EMPTY = torch.iinfo(torch.int32).max


class Compact:
    """Turns what one pass sees, by the positions [B, K, S] that are resident in it (-1 for empty slots)."""

    def __init__(self, rotation: Rotation, device: torch.device) -> None:
        self.rotation = rotation
        self.frequencies = torch.tensor(rotation.frequencies, dtype=torch.float32, device=device)

    def at_ranks(self, query: Tensor, placed: Tensor, keys: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Both, as ``queries`` and ``keys`` give them."""
        return self.queries(query, placed, position), self.keys(keys, position)

    def keys(self, keys: Tensor, position: Tensor) -> Tensor:
        """Keys [B, K, S, D] at their ranks."""
        if not self.rotation.frequencies:
            return keys
        return turn(keys, position.clamp(min=0), ranks(position, position), self.frequencies)

    def queries(self, query: Tensor, placed: Tensor, position: Tensor) -> Tensor:
        """Queries [B, Q, N, D] of the positions ``placed`` [B, N] (-1 for padding) at the ranks that these have now in
        the KV head of each."""
        if not self.rotation.frequencies:
            return query
        heads = position.shape[1]
        rank = ranks(position, placed[:, None].expand(-1, heads, -1).contiguous())
        grouped = rearrange(query, "b (k g) n d -> b k g n d", k=heads)
        turned = turn(grouped, placed.clamp(min=0)[:, None, None], rank[:, :, None], self.frequencies)
        return rearrange(turned, "b k g n d -> b (k g) n d")


def ranks(position: Tensor, asked: Tensor) -> Tensor:
    """How many resident tokens come before each position ``asked`` [B, K, n]."""
    ordered = torch.where(position < 0, EMPTY, position).sort(-1).values
    return torch.searchsorted(ordered, asked.to(ordered.dtype).contiguous())
