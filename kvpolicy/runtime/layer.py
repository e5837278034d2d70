"""The five steps of one layer: admit, (read), attend, observe, update. Once for a prompt pass, once for a token.

A generated pass is what gets compiled: its shapes never change, it asks nothing of the host, and it branches only on
the plan's numbers and on ``moment.kind``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpolicy.attention import (
    Rotation,
    attend_pages,
    attend_part,
    attend_prompt,
    attend_prompt_and_sum,
    attend_shared,
    attend_slots,
    merge_parts,
    newest_queries,
    prompt_scores,
)
from kvpolicy.attention.backends import TORCH, TRITON
from kvpolicy.attention.kernels.library import attend_pages as kernel_pages
from kvpolicy.attention.kernels.library import prompt_scores as kernel_prompt_scores
from kvpolicy.attention.kernels.ops import attend_slots as decode_attention
from kvpolicy.errors import CacheError
from kvpolicy.plan import LayerPlan, ModelGeometry, Plan, PoolPlan, needs, scoring_leaves
from kvpolicy.runtime.chunks import Chunk, attend_in_chunks
from kvpolicy.runtime.clocks import Clocks, Places
from kvpolicy.runtime.compact import Compact
from kvpolicy.runtime.evict import Leave, drop_all_at_once, drop_some, fires, record_size
from kvpolicy.runtime.fused import Fusion
from kvpolicy.runtime.moving import move
from kvpolicy.runtime.packing import outlives_slots, pack
from kvpolicy.runtime.pool import PoolPolicy, readings
from kvpolicy.runtime.reading import Reader, read_slots
from kvpolicy.runtime.state import LayerState
from kvpolicy.runtime.stored import settle
from kvpolicy.runtime.turn import Turn
from kvpolicy.scorers.sight import EveryQuery, LastQueries, NewestQuery, Sight, masked_softmax, sums_probabilities

PROMPT, PLAIN, UPDATE = "prompt", "plain", "update"


@dataclass
class Moment:
    """The pass that is open: set by ``PolicyCache.begin``, read by every layer. ``kind`` is None between passes.

    For prompt passes also the tokens' positions [B, N], by stream their numbers within the turn [B, N], which of them
    have the ``traits`` that the policy asks for [B, N], whether more of the turn is to come, whether the cache was
    empty and nothing is padded (``whole``), and whether it is the turn's first pass; and its ``chunks``, where an
    update follows each.
    ``plan`` and ``kinds`` do not change from pass to pass: the cache's plan, and the kinds of its generated passes.
    """

    kind: str | None = None
    columns: int = 0
    position: Tensor | None = None
    places: Places = ()
    traits: Mapping[str, Tensor] = field(default_factory=dict)
    more: bool = False
    whole: bool = False
    first: bool = False
    empty: bool = False
    plan: Plan | None = None
    kinds: tuple[str, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    def at(self, number: int) -> Moment:
        """The same for one of its chunks alone, which ends as a turn does."""
        chunk, begins = self.chunks[number], number == 0
        return replace(
            self,
            columns=chunk.valid.shape[1],
            position=chunk.position,
            places=chunk.places,
            traits=chunk.traits,
            more=False,
            whole=self.whole and begins,
            empty=self.empty and begins,
            chunks=(),
        )


class PolicyLayer(CacheLayerMixin):
    """One layer's slots under a policy.

    ``forward`` replaces attention over a growing cache. Shapes: query [B, Q, N, D]; key, value [B, K, N, D].
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    shows_reading = False
    """Whether generated passes tell in ``chosen`` which units they read of each pool that selects [B, K, P], and in
    ``attended`` the positions that were resident then [B, K, S], and prompt passes in ``after_chunks`` those that were
    after each chunk: for who looks on, at a price."""

    def __init__(
        self,
        plan: LayerPlan,
        geometry: ModelGeometry,
        clocks: Clocks,
        moment: Moment,
        device: Any,
        backend: str = TORCH,
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.backend = backend
        self.clocks = clocks
        self.moment = moment
        self.device = torch.device(device)
        self.compact = Compact(rotation or Rotation.none(), self.device) if plan.compact else None
        self.turn: Turn | None = None
        self.after_chunks: list[Tensor] = []
        self.is_initialized = True
        self._adopt(plan)

    def _adopt(self, plan: LayerPlan) -> None:
        self.plan = plan
        self.state = LayerState(plan, self.device, self.clocks)
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
        # On a GPU the prompt's attention is another's kernel, and ours finds the scores.
        self.sums_prompt = self.backend == TORCH and any(
            leaf.signal == "attention" and sums_probabilities(leaf)
            for policy in self.policies.values()
            for leaf in policy.leaves
        )

    @property
    def parts(self) -> list[PolicyLayer]:
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

    def pool_peak(self, pool: PoolPlan) -> Tensor:
        """The most tokens of a pool that a generated pass has met in each row and head [B, K], whole pages."""
        resident = self.state.resident_units(pool).sum(-1) * pool.page
        peak = self.state.tensors.get(f"{pool.name}.peak")
        return resident if peak is None else torch.maximum(resident, peak)

    def peak(self) -> int:
        """The most tokens that a generated pass has met in any row and head: the sum of its pools' peaks."""
        return int(sum((self.pool_peak(pool) for pool in self.plan.pools), torch.zeros(())).max())

    # What transformers asks of a cache layer ------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is lazy: the plan knew every size."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise CacheError("this cache belongs to a model with a policy applied; kvpolicy.apply(model, policy) first")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return self.clocks.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state.clear()
        self.turn = None

    # The five steps -------------------------------------------------------------------------------------------------

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention output [B, N, Q, D] of a pass that ``PolicyCache.begin`` opened."""
        kind = self.moment.kind
        if kind is None:
            raise CacheError(
                "this pass was not opened: the model was called in a way that skips kvpolicy's hooks (a model compiled "
                "as a whole, or a decoder layer called by hand); call cache.begin(columns) before each pass, or let "
                "kvpolicy compile it: kvpolicy.apply(model, policy, compile=True)"
            )
        if kind == PROMPT and self.moment.chunks:
            return attend_in_chunks(self, query, key, value, self._prompt, scaling)
        if kind == PROMPT:
            return self._prompt(query, key, value, scaling)
        return self._token(query, key, value, scaling, kind)

    # One generated token a row ------------------------------------------------------------------------------------

    def _token(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, kind: str) -> Tensor:
        state = self.state
        if "queries" in state.tensors:
            self._remember_query(query)
        if self.fused is not None:
            return self.fused(query, key, value, scaling, kind == UPDATE)
        self._admit(key, value)
        turned: Tensor | None = None
        if self.compact is not None:
            newest = self.clocks.position[:, None]
            query, turned = self.compact.at_ranks(query, newest, state.all_keys(), state.position)
        grouped = rearrange(query, "b (k g) 1 d -> b k g d", k=state.keys.shape[1])
        attend = self._attend_to_chosen if self.readers or self.plan.shared else self._attend_to_all
        out, sight = attend(grouped, turned, scaling, kind)
        self._learn_and_drop(sight, kind == UPDATE)
        if self.arrival is not None and self.arrival.store is not None:
            settle(state, self.arrival)
        return rearrange(out, "b k g d -> b 1 (k g) d")

    def _attend_to_all(
        self, query: Tensor, turned: Tensor | None, scaling: float, kind: str
    ) -> tuple[Tensor, NewestQuery]:
        """Step 3 where every resident is read: attention of one query a row [B, K, G, D]."""
        state, wanted = self.state, self.reads_logits[kind]
        sight = NewestQuery(state, scaling, {}, query, turned=turned)
        keys, values = sight.keys, state.all_values()
        if self.backend == TRITON:
            out, logits = decode_attention(query, keys, values, state.position, scaling, wanted)
            if wanted:
                sight.all_logits, sight.probabilities = logits, torch.softmax(logits, dim=-1)
        elif wanted:
            out, sight.all_logits, sight.probabilities = attend_slots(query, keys, values, state.position < 0, scaling)
        else:
            visible = (state.position >= 0)[:, :, None]
            out = F.scaled_dot_product_attention(query, keys, values, visible, scale=scaling)
        return out, sight

    def _attend_to_chosen(
        self, query: Tensor, turned: Tensor | None, scaling: float, kind: str
    ) -> tuple[Tensor, NewestQuery]:
        """Steps 2 and 3 where pools select, or heads share slots: attention of one query a row [B, K, G, D] over what
        is read.

        Unless a scorer needs the logits of every slot, those that are not read are never touched.
        """
        state, clocks = self.state, self.clocks
        hidden = state.position < 0
        sight = NewestQuery(state, scaling, {}, query, turned=turned)
        if self.reads_logits[kind] or any(reader.reads_logits for reader in self.readers):
            sight = NewestQuery.of(state, query, hidden, scaling, turned)
        values = readings(state, clocks)
        chosen = {reader.name: reader.choose(state, clocks, values, sight) for reader in self.readers}
        sight.candidates = {}
        if self.shows_reading:
            self.chosen, self.attended = chosen, state.position.clone()
        if self.reads_logits[kind]:
            sight.read = read_slots(state, chosen)
            sight.probabilities = masked_softmax(sight.all_logits, sight.read[:, :, None])
            return state.mix(sight.probabilities), sight
        attend_paged = kernel_pages if self.backend == TRITON else attend_pages
        parts = []
        for pools in self.stretches:
            span = slice(pools[0].offset, pools[-1].offset + pools[-1].capacity)
            whole = pools[0].store is None
            keys = (state.keys if turned is None else turned)[:, :, span] if whole else sight.keys_of(pools[0])
            given = (query, keys, state.values[:, :, span] if whole else state.pool_values(pools[0]))
            if pools[0].name in chosen:
                index = chosen[pools[0].name].int()
                parts.append(attend_paged(*given, state.position[:, :, span], index, pools[0].page, scaling))
            else:
                parts.append(attend_part(*given, hidden[:, :, span], scaling))
        parts += [attend_shared(query, keys, values, owner, scaling) for keys, values, owner in state.shared_slots]
        return merge_parts(*zip(*parts, strict=True))[0] if len(parts) > 1 else parts[0][0], sight

    def _remember_query(self, query: Tensor) -> None:
        """Put the newest query [B, Q, 1, D] over the oldest of the window."""
        queries, position = self.state.tensors["queries"], self.state.tensors["query_position"]
        row, place = self.state.rows[:, 0], self.clocks.position % queries.shape[2]
        queries[row, :, place] = query[:, :, 0]
        position[row, place] = self.clocks.position

    def _admit(self, key: Tensor, value: Tensor) -> None:
        state, clocks, pool = self.state, self.clocks, self.arrival
        assert pool is not None
        clock = clocks.streams[pool.stream]
        unit = state.newest_unit(pool)
        opens = None if pool.page == 1 else clock.fill == 1
        inside = unit if opens is None else unit * pool.page + clock.fill[:, None] - 1
        slot = (state.rows, state.heads, pool.offset + inside)
        if pool.store is None:
            state.keys[slot] = key[:, :, 0]
            state.values[slot] = value[:, :, 0]
        else:
            waiting = (state.rows, state.heads, (clock.fill[:, None] - 1).expand_as(unit))
            state.tensors[f"{pool.name}.keys.open"][waiting] = key[:, :, 0]
            state.tensors[f"{pool.name}.values.open"][waiting] = value[:, :, 0]
        state.position[slot] = clocks.position[:, None].expand_as(unit)
        if pool.needs_ordinals:
            ordinal = state.tensors[f"{pool.name}.ordinal"]
            ordinal[state.rows, state.heads, inside] = clock.ordinal[:, None].expand_as(unit)
        for side, wider in (("high", torch.maximum), ("low", torch.minimum)):
            bound = state.tensors.get(f"{pool.name}.{side}")
            if bound is not None and opens is not None:
                old = bound[state.rows, state.heads, unit]
                widened = torch.where(opens[:, None, None], key[:, :, 0], wider(old, key[:, :, 0]))
                bound[state.rows, state.heads, unit] = widened
        self.policies[pool.name].enter(state, clocks, unit, opens)

    def _learn_and_drop(self, sight: Sight, update: bool) -> None:
        """Steps 4 and 5 of a generated pass: every pool observes before any drops, and scores when its turn comes."""
        state, clocks = self.state, self.clocks
        sights = {"current": sight, "all": sight}
        values = readings(state, clocks)
        working = [self.policies[pool.name] for pool in self.ordered if pool.evicts and pool.cadence > 0]
        for policy in working:
            if update or policy.remembers:
                sight.candidates[policy.name] = policy.candidates(state, clocks, values)
        if update:
            shared = len(working) > 1 or any(pool.to for pool in self.ordered)
            before = state.all_positions.clone() if shared else state.all_positions
            sights |= self._windows(working, state, before, sight)
        for policy in working:
            policy.observe(sights, clocks, values)
        for pool in self.ordered:
            if update and pool.evicts and pool.cadence > 0:
                policy, values = self.policies[pool.name], readings(state, clocks)
                if policy.guards_by_size or pool.fed:
                    sight.candidates[pool.name] = policy.candidates(state, clocks, values)
                policy.look_back(sights, clocks, values, fires(pool, clocks))
                score = policy.score(sights, clocks, values)
                leave = self._sending(pool, state, sights)
                drop_some(policy, state, clocks, values, score, sight.candidates[pool.name], leave)
            changes = update if pool.evicts or pool.fed else "generated" in pool.admits
            if pool.size_read and pool.cadence > 0 and changes:
                record_size(pool, state, clocks)

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
            sights[str(last)] = LastQueries(state, seen.scaling, seen.candidates, queries, placed, position, **own)
        return sights

    # A prompt pass ------------------------------------------------------------------------------------------------

    def _prompt(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        moment = self.moment
        assert moment.position is not None
        if moment.first or self.turn is None:
            self.turn = Turn(self.state, self.clocks, self.geometry, moment.empty)
        self.turn.widen(self.policies, self.clocks)
        self.turn.admit(key, value, moment.position, moment.places, self.clocks, self.policies)
        wide, sums = self.turn.state, None
        if "queries" in self.state.tensors:
            self._remember_queries(query, moment.position)
        keys = wide.keys
        if self.compact is not None and not moment.empty:  # in an empty cache ranks are positions
            query, keys = self.compact.at_ranks(query, moment.position, keys, wide.position)
        if self.sums_prompt:
            out, sums = self._attend_and_sum(query, keys, wide, scaling)
        elif moment.whole:
            grouped = query.shape[1] > key.shape[1]
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        else:
            out = attend_prompt(query, keys, wide.values, moment.position, wide.position, scaling)
        self._learn_and_drop_prompt(query, keys, wide, scaling, sums)
        if not moment.more:
            pack(self.turn.state, self.state, self.clocks)
            self.turn = None
        return rearrange(out, "b q n d -> b n q d")

    def _remember_queries(self, query: Tensor, position: Tensor) -> None:
        """Put a prompt pass's newest queries [B, Q, N, D] into the window: each lies at its position modulo w."""
        window, placed = self.state.tensors["queries"], self.state.tensors["query_position"]
        newest, place = newest_queries(query, position, window.shape[2])
        row, which = (place >= 0).nonzero(as_tuple=True)
        slot = place[row, which] % window.shape[2]
        window[row, :, slot] = newest[row, :, which]
        placed[row, slot] = place[row, which].to(placed.dtype)

    def _attend_and_sum(self, query: Tensor, keys: Tensor, wide: LayerState, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention of a prompt pass, and what its queries paid to each slot [B, K, G, S]."""
        moment = self.moment
        assert moment.position is not None
        pools = [pool for pool in wide.plan.pools if pool.hears_prompts]
        # Where one pool takes them all, and nothing was there before, it holds the pass's own tokens, in order.
        in_order = moment.empty and len(pools) == 1
        span = wide.span(pools[0]) if in_order else slice(None)
        out, found = attend_prompt_and_sum(
            query,
            keys[:, :, span],
            wide.values[:, :, span],
            moment.position,
            wide.position[:, :, span],
            scaling,
            in_order=in_order,
            padded=not moment.whole,
        )
        sums = found.new_zeros(*found.shape[:3], wide.position.shape[2])
        sums[..., span] = found
        return out, sums

    def _learn_and_drop_prompt(
        self, query: Tensor, keys: Tensor, wide: LayerState, scaling: float, sums: Tensor | None
    ) -> None:
        """Steps 4 and 5 of a prompt pass, on the turn's workspace; only the turn's last pass drops."""
        clocks, last = self.clocks, not self.moment.more
        working = [self.policies[pool.name] for pool in self.ordered if pool.evicts]
        if not last and not any(policy.remembers for policy in working):
            return
        values = readings(wide, clocks)
        candidates = {policy.name: policy.candidates(wide, clocks, values) for policy in working}
        sights, active = self._prompt_sights(query, keys, wide, scaling, candidates, sums)
        for policy in working:
            policy.observe(sights, clocks, values, active)
        spoken = clocks.turn_tokens > 0  # a row that brought nothing to this turn has had none
        for pool in self.ordered if last else ():
            if pool.evicts:
                policy, values = self.policies[pool.name], readings(wide, clocks)
                if policy.guards_by_size or pool.fed:
                    candidates[pool.name] = policy.candidates(wide, clocks, values)
                policy.look_back(sights, clocks, values, spoken)
                score = policy.score(sights, clocks, values)
                leave = self._sending(pool, wide, sights)
                drop_all_at_once(policy, wide, values, score, candidates[pool.name], spoken, leave)
            if pool.size_read:
                units = wide.resident_units(wide.pools[pool.name]).sum(-1)
                size = wide.tensors[f"{pool.name}.size"]
                size.copy_(torch.where(spoken[:, None], units * pool.page, size))

    def _prompt_sights(
        self,
        query: Tensor,
        keys: Tensor,
        wide: LayerState,
        scaling: float,
        candidates: dict[str, Tensor],
        sums: Tensor | None,
    ) -> tuple[dict[str, Sight], Tensor]:
        """What scorers see of the prompt pass, and which rows [B] brought any token."""
        position = self.moment.position
        assert position is not None
        active = (position >= 0).any(1)
        before = wide.position.clone()  # what queries saw, whatever other pools drop before a pool's turn comes
        scores = kernel_prompt_scores if self.backend == TRITON else prompt_scores
        turned = None if self.compact is None else keys
        every = EveryQuery(wide, scaling, candidates, query, position, before, sums, scores, turned=turned)
        working = [self.policies[name] for name in candidates]
        sights = {"all": every, **self._windows(working, wide, before, every)}
        if not any(leaf.queries == "current" for name in candidates for leaf in self.policies[name].leaves):
            return sights, active
        newest = position.argmax(1)
        grouped = rearrange(query, "b (k g) n d -> b k g n d", k=wide.keys.shape[1])
        index = newest[:, None, None, None, None].expand(*grouped.shape[:3], 1, grouped.shape[4])
        one = grouped.gather(3, index).squeeze(3)
        hidden = (wide.position < 0) | ~active[:, None, None]
        one = torch.where(active[:, None, None, None], one, 0.0)
        current = NewestQuery.of(wide, one, hidden, scaling, turned)
        current.candidates = candidates
        return {"current": current, **sights}, active


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


def _reads_logits(layer: LayerPlan, kind: str) -> bool:
    """Whether a generated pass of this kind must hand out logits: a leaf reads them, and it observes this pass."""
    single = any(pool.page == 1 for pool in layer.pools)
    for pool in layer.pools:
        for leaf in scoring_leaves(pool) if pool.cadence > 0 else ():
            read = needs(leaf.signal)
            if (leaf.remembers or kind == UPDATE) and ("logits" in read or (single and "bounds" in read)):
                return True
    return False
