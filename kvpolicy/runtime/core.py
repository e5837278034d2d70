"""A layer of the cache: its slots, its pools at work, and what transformers asks of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvpolicy.attention import Formula, Rotation, newest_queries
from kvpolicy.attention.backends import TORCH, TRITON
from kvpolicy.plan import LayerPlan, ModelGeometry, PoolPlan, needs, scoring_leaves
from kvpolicy.runtime.ahead import Ahead
from kvpolicy.runtime.clocks import TORCH_DTYPES
from kvpolicy.runtime.compact import Compact
from kvpolicy.runtime.evict import Leave
from kvpolicy.runtime.fused import Fusion
from kvpolicy.runtime.moment import PLAIN, UPDATE, Site
from kvpolicy.runtime.moving import move
from kvpolicy.runtime.packing import outlives_slots, pack
from kvpolicy.runtime.pool import PoolPolicy
from kvpolicy.runtime.protocol import FixedLayer
from kvpolicy.runtime.ranks import ALONE, Ranks
from kvpolicy.runtime.reading import Reader
from kvpolicy.runtime.state import LayerState
from kvpolicy.runtime.turn import Turn
from kvpolicy.scorers.sight import LastQueries, Sight, sums_probabilities

READ_OF = 7
"""Of so many slots or fewer one must be read, or it is cheaper to look for each token at those that it reads."""


class LayerCore(FixedLayer):
    """One layer's slots under a policy, and what both kinds of pass need; what each does is in files of its own."""

    shows_reading = False
    """Whether generated passes tell in ``chosen`` which units they read of each pool that selects [B, K, P], and in
    ``attended`` the positions that were resident then [B, K, S], and prompt passes in ``after_chunks`` those that were
    after each chunk: for who looks on, at a price."""

    def __init__(
        self,
        plan: LayerPlan,
        geometry: ModelGeometry,
        site: Site,
        backend: str = TORCH,
        rotation: Rotation | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.dtype = TORCH_DTYPES[geometry.dtype]
        self.ranks = ranks
        self.heads = geometry.kv_heads
        self.backend = backend
        self.clocks, self.moment, self.device = site.clocks, site.moment, site.device
        self.compact = Compact(rotation or Rotation.none(), self.device) if plan.compact else None
        self.turn: Turn | None = None
        self.after_chunks: list[Tensor] = []
        self.is_initialized = True
        self._adopt(plan)

    def _adopt(self, plan: LayerPlan) -> None:
        self.plan = plan
        self.state = LayerState(plan, self.device, self.clocks, self.ranks)
        self.policies = {pool.name: PoolPolicy(pool) for pool in plan.pools}
        self.ordered = [plan.pools[index] for index in plan.order]
        self.chosen: dict[str, Tensor] = {}
        self.readers = [Reader(pool) for pool in plan.pools if pool.read is not None]
        self.stretches = _stretches(plan)
        self.arrival = next((pool for pool in plan.pools if "generated" in pool.admits), None)
        self.reads_logits = {kind: _reads_logits(plan, kind) for kind in (PLAIN, UPDATE)}
        fusion = Fusion.of(plan, self.geometry) if self.backend == TRITON else f"the backend is {self.backend}"
        self.fused = None if isinstance(fusion, str) else fusion.bind(self.state, self.clocks)
        self.unfused_reason = fusion if isinstance(fusion, str) else None
        self.looks_ahead = self.backend == TORCH and self.compact is None and _stays(plan)
        # On a GPU the prompt's attention is another's kernel, and ours finds the scores.
        self.sums_prompt = self.backend == TORCH and any(
            leaf.signal == "attention" and sums_probabilities(leaf)
            for policy in self.policies.values()
            for leaf in policy.leaves
        )

    @property
    def parts(self) -> list[LayerCore]:
        """Its heads in groups of equal pools: one here, more in a ``SplitLayer``."""
        return [self]

    def positions(self, chunk: int | None = None) -> Tensor:
        """Kept positions by slot [B, K, S], -1 where a slot is empty: now, or after a chunk of the last prompt pass,
        where somebody looks on."""
        return (self.state.all_positions if chunk is None else self.after_chunks[chunk]).long()

    def replan(self, plan: LayerPlan) -> None:
        """Take new sizes and keep what is resident."""
        old = self.state
        self._adopt(plan)
        pack(old, self.state, self.clocks)
        for name, tensor in old.tensors.items():
            if outlives_slots(name):
                self.state.tensors[name].copy_(tensor)

    def look_ahead(self, query: Tensor, key: Tensor, formula: Formula) -> Ahead | None:
        return Ahead(self.state, query, key, formula, self.moment.room) if self.looks_ahead else None

    def pool_peak(self, pool: PoolPlan) -> Tensor:
        """The most tokens of a pool that a generated pass has met in each row and head [B, K], whole pages."""
        resident = self.state.resident_units(pool).sum(-1) * pool.page
        peak = self.state.tensors.get(f"{pool.name}.peak")
        return resident if peak is None else torch.maximum(resident, peak)

    def peak(self) -> int:
        """The most tokens that a generated pass has met in any row and head: the sum of its pools' peaks."""
        return int(sum((self.pool_peak(pool) for pool in self.plan.pools), torch.zeros(())).max())

    def reset(self) -> None:
        self.state.clear()
        self.turn = None

    # What both kinds of pass need ------------------------------------------------------------------------------------

    def _sending(self, pool: PoolPlan, state: LayerState, sights: Mapping[str, Sight]) -> Leave | None:
        """What takes the units that a pool drops; None where they are gone for good."""
        if pool.to is None:
            return None
        target = self.policies[pool.to]

        def leave(unit: Tensor, gone: Tensor) -> None:
            places = None
            if self.turn is not None and state is self.turn.state:
                places = self.turn.landing[pool.name] + unit
            move(state.pools[pool.name], target, state, self.clocks, (unit, gone), places, sights.values())

        return leave

    def _windows(
        self,
        working: list[PoolPolicy],
        state: LayerState,
        position: Tensor,
        seen: Sight,
    ) -> dict[str, Sight]:
        """What the newest queries see, by how many of them; ``position`` is the state's while the pass attended, and
        ``seen`` what that saw."""
        sights: dict[str, Sight] = {}
        for last in sorted({last for policy in working for last in policy.windows}):
            queries, placed = self.state.tensors["queries"], self.state.tensors["query_position"]
            if last < queries.shape[2]:
                queries, placed = newest_queries(queries, placed, last)
            if self.compact is not None:
                queries = self.compact.queries(queries, placed, position)
            own = {"read": seen.read, "turned": seen.turned}
            sights[str(last)] = LastQueries(state, seen.formula, seen.candidates, queries, placed, position, **own)
        return sights


def _stretches(layer: LayerPlan) -> list[list[PoolPlan]]:
    """Neighbouring pools that are read alike: whole, or each by its own choice."""
    stretches: list[list[PoolPlan]] = []
    for pool in sorted((pool for pool in layer.pools if not pool.shared), key=lambda pool: pool.offset):
        alone = (
            pool.read is not None or pool.store is not None
        )  # of what is stored in few bits, each is opened up apart
        if stretches and not alone and stretches[-1][-1].read is None and stretches[-1][-1].store is None:
            stretches[-1].append(pool)
        else:
            stretches.append([pool])
    return stretches


def _stays(layer: LayerPlan) -> bool:
    """Whether what lies in slots is written by tokens that enter alone, and most of it is read for each of them."""
    if layer.shared or any(pool.store is not None or pool.to is not None for pool in layer.pools):
        return False
    return all(pool.read_units * pool.page * READ_OF >= pool.capacity for pool in layer.pools if pool.read is not None)


def _reads_logits(layer: LayerPlan, kind: str) -> bool:
    """Whether a generated pass of this kind must hand out logits: a leaf reads them, and it observes this pass."""
    single = any(pool.page == 1 for pool in layer.pools)
    for pool in layer.pools:
        for leaf in scoring_leaves(pool) if pool.cadence > 0 else ():
            read = needs(leaf.signal)
            if (leaf.remembers or kind == UPDATE) and ("logits" in read or (single and "bounds" in read)):
                return True
    return False
