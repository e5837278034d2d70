"""A layer whose KV heads have policies of their own: each group of heads with equal pools has its own slots.

So a head that keeps a window takes a window's memory, whatever its neighbour keeps (DuoAttention, arXiv:2410.10819).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.attention import Formula, Rotation
from kvpolicy.plan import LayerPlan, ModelGeometry
from kvpolicy.runtime.clocks import TORCH_DTYPES
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.runtime.moment import Site
from kvpolicy.runtime.protocol import FixedLayer
from kvpolicy.runtime.ranks import ALONE, Ranks


class SplitLayer(FixedLayer):
    """Groups of heads, each a layer of its own; ``forward`` is that of ``PolicyLayer``, over all heads."""

    def __init__(
        self,
        plan: LayerPlan,
        geometry: ModelGeometry,
        site: Site,
        backend: str,
        rotation: Rotation | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.dtype = TORCH_DTYPES[geometry.dtype]
        self.clocks, self.moment, self.device = site.clocks, site.moment, site.device
        self.backend = backend
        self.is_initialized = True
        self.parts = [
            PolicyLayer(group, geometry.of_heads(len(group.members)), site, backend, rotation, ranks)
            for group in plan.groups
        ]
        self.heads = geometry.kv_heads
        first = min(head for group in plan.groups for head in group.members)  # above 0 on all ranks but the first
        self.kv_heads = [torch.tensor(group.members, device=self.device) - first for group in plan.groups]
        group = torch.arange(geometry.group, device=self.device)
        self.query_heads = [(heads[:, None] * geometry.group + group).flatten() for heads in self.kv_heads]
        self.in_order = torch.cat(self.query_heads).argsort()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
        """Attention output [B, N, Q, D]; shapes as in ``PolicyLayer.forward``."""
        outputs = []
        for part, kv_heads, query_heads in zip(self.parts, self.kv_heads, self.query_heads, strict=True):
            given = (query.index_select(1, query_heads), key.index_select(1, kv_heads), value.index_select(1, kv_heads))
            outputs.append(part.forward(*given, formula.of_heads(query_heads)))
        return torch.cat(outputs, dim=2).index_select(2, self.in_order)

    def replan(self, plan: LayerPlan) -> None:
        """Take new sizes and keep what is resident."""
        self.plan = plan
        for part, group in zip(self.parts, plan.groups, strict=True):
            part.replan(group)

    def positions(self, chunk: int | None = None) -> Tensor:
        """Kept positions by slot [B, K, S], -1 where a slot is empty, or another group has more of them: now, or after
        a chunk of the last prompt pass."""
        held = [part.positions(chunk) for part in self.parts]
        most = max(positions.shape[2] for positions in held)
        found = held[0].new_full((held[0].shape[0], sum(map(len, self.kv_heads)), most), -1)
        for heads, positions in zip(self.kv_heads, held, strict=True):
            found[:, heads, : positions.shape[2]] = positions
        return found.long()

    def peak(self) -> int:
        """The most tokens that a generated pass has met in any row and head."""
        return max(part.peak() for part in self.parts)

    def reset(self) -> None:
        for part in self.parts:
            part.reset()
