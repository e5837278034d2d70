"""Which KV heads of a model a process has, and what the others have scored: tensor parallelism as a cache sees it.

Under tensor parallelism each rank computes, and caches, a slice of the KV heads of every layer. Most policies decide
head by head and need nothing of one another; where heads decide together, scores are gathered once per update, and
every rank then computes the same decision from the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """``size`` processes that share the KV heads of a model evenly, in order; this one is ``rank``.

    ``group`` is the name of their process group: a name can be pickled, and is a constant to a graph.
    """

    rank: int = 0
    size: int = 1
    group: str = ""

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """The ranks of a process group (a ``torch.distributed.ProcessGroup``)."""
        size = dist.get_world_size(group)
        return cls(dist.get_rank(group), size, group.group_name) if size > 1 else ALONE

    def heads(self, kv_heads: int) -> range:
        """The KV heads that lie here, of all that the model has."""
        here = kv_heads // self.size
        return range(self.rank * here, (self.rank + 1) * here)

    def gather(self, tensor: Tensor) -> Tensor:
        """What all heads say [B, K, ...], from what those say that lie here [B, K / size, ...]. A collective."""
        if self.size == 1:
            return tensor
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(tensor.contiguous(), self.size, self.group)
        parts = torch.ops._c10d_functional.wait_tensor(gathered).chunk(self.size)  # one after the other, by rank
        return torch.cat(parts, dim=1)

    def here(self, tensor: Tensor) -> Tensor:
        """The part [B, K / size, ...] for the heads that lie here, of what is known of all [B, K, ...]."""
        if self.size == 1:
            return tensor
        heads = self.heads(tensor.shape[1])
        return tensor[:, heads.start : heads.stop]

    def collect(self, value: Any) -> list[Any]:
        """What each rank has to say, any picklable value, in order of ranks. A collective; waits for the host."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        group = dist.distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]
        dist.all_gather_object(found, value, group=group)
        return found

    def largest(self, number: int) -> int:
        """The largest number that any rank has. A collective; waits for the host."""
        return int(max(self.collect(number)))


ALONE = Ranks()
"""One process that has all heads."""

SUMMED = frozenset({"seen", "evicted", "moved", "bytes"})


def merged(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """What several ranks have counted, as one would: what is counted by head is summed, of bounds and peaks the most
    counts, and each of them has seen every pass."""
    found: dict[str, Any] = {}
    for name, first in stats[0].items():
        values = [each[name] for each in stats]
        if name == "passes":
            found[name] = first
        elif isinstance(first, dict):
            pools = list(dict.fromkeys(pool for each in values for pool in each))
            found[name] = {pool: merged([each[pool] for each in values if pool in each]) for pool in pools}
        else:
            found[name] = sum(values) if name in SUMMED else max(values)
    return found
