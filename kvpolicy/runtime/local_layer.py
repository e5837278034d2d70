"""A layer that attends to the text nearby, and that no policy touches: a ring of as many slots as a query sees.

Token p lies in slot p mod S. So a token is written over the one that has just left its window, in every row by the
row's own clock, and nothing is evicted, moved or counted. Sliding windows (arXiv:2004.05150) need no mask then but for
slots that are still empty; chunked attention (Llama 4) also hides what belongs to an earlier chunk.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from kvpolicy.attention import Formula, attend_visible
from kvpolicy.attention.backends import TORCH
from kvpolicy.plan import LocalPlan
from kvpolicy.plan.layer_kinds import SLIDING
from kvpolicy.runtime.clocks import TORCH_DTYPES
from kvpolicy.runtime.given import attend_one_by_one
from kvpolicy.runtime.moment import GIVEN, PROMPT, Site, opened
from kvpolicy.runtime.protocol import FixedLayer

TILE = 512
"""Queries of a prompt pass that are masked at once."""


class LocalLayer(FixedLayer):
    """Slots keys, values [B, K, S, D] and position [B, S], -1 for an empty one; ``forward`` as of ``PolicyLayer``."""

    backend = TORCH

    def __init__(self, plan: LocalPlan, site: Site) -> None:
        super().__init__()
        self.clocks, self.moment, self.device = site.clocks, site.moment, site.device
        self.is_initialized = True
        self._adopt(plan)
        self.reset()

    def _adopt(self, plan: LocalPlan) -> None:
        self.plan, self.span = plan, plan.layer.span
        self.window = plan.layer.span if plan.layer.kind == SLIDING else None
        self.heads, self.dtype = plan.buffers[0].shape[1], TORCH_DTYPES[plan.buffers[0].dtype]
        self.tensors = {
            buffer.name: torch.zeros(buffer.shape, dtype=TORCH_DTYPES[buffer.dtype], device=self.device)
            for buffer in plan.buffers
        }
        self.keys, self.values, self.position = (self.tensors[name] for name in ("keys", "values", "position"))
        self.rows = torch.arange(self.position.shape[0], device=self.device)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
        """Attention output [B, N, Q, D] of a pass that ``PolicyCache.begin`` opened."""
        kind = opened(self.moment)
        if kind == PROMPT:
            return self._prompt(query, key, value, formula)
        if kind == GIVEN:
            return attend_one_by_one(self, query, key, value, formula)
        now = self.clocks.position
        slot = now % self.plan.slots
        self.keys[self.rows, :, slot] = key[:, :, 0]
        self.values[self.rows, :, slot] = value[:, :, 0]
        self.position[self.rows, slot] = now
        out = attend_visible(query, self.keys, self.values, self._visible(now[:, None], self.position), formula)
        return rearrange(out, "b q 1 d -> b 1 q d")

    def _visible(self, query: Tensor, keys: Tensor) -> Tensor:
        """Which keys at positions [B, S] the queries at positions [B, N] see: [B, N, S]."""
        query, keys = query[:, :, None], keys[:, None]
        near = keys > query - self.span if self.window else keys // self.span == query // self.span
        return (keys >= 0) & (keys <= query) & near

    def _prompt(self, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
        """A prompt pass: its queries see what is still there and each other. Eager."""
        place = self.moment.position
        assert place is not None
        keys, values, places = key, value, place
        before = 0 if self.moment.empty else self.plan.slots
        if before:
            keys, values = torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)
            places = torch.cat([self.position.to(place.dtype), place], dim=1)
        outputs = []
        for start in range(0, query.shape[2], TILE):
            stop = min(start + TILE, query.shape[2])
            # Without padding nothing further back than the window is in sight, so it need not be masked either.
            behind = before + start - self.span + 1 if self.moment.whole else 0
            seen = slice(max(0, behind), before + stop)
            visible = self._visible(place[:, start:stop], places[:, seen])
            visible[..., 0] |= place[:, start:stop] < 0  # padding sees something, so that its result is a number
            given = (query[:, :, start:stop], keys[:, :, seen], values[:, :, seen], visible)
            outputs.append(attend_visible(*given, formula))
        self._keep(key, value, place)
        return rearrange(torch.cat(outputs, dim=2), "b q n d -> b n q d")

    def _keep(self, key: Tensor, value: Tensor, place: Tensor) -> None:
        """Put the newest tokens at ``place`` [B, N] into the ring."""
        newest = place.amax(1, keepdim=True)
        row, column = ((place >= 0) & (place > newest - self.plan.slots)).nonzero(as_tuple=True)
        slot = place[row, column] % self.plan.slots
        self.keys[row, :, slot] = key[row, :, column]
        self.values[row, :, slot] = value[row, :, column]
        self.position[row, slot] = place[row, column].to(self.position.dtype)

    def replan(self, plan: LocalPlan) -> None:
        """Take a new length of the ring and keep what is in it."""
        keys, values, place = self.keys, self.values, self.position.long()
        self._adopt(plan)
        self.reset()
        self._keep(keys, values, place)

    def reset(self) -> None:
        self.position.fill_(-1)
