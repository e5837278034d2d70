"""A generated pass of one layer: one token a row, through all five steps.

This is what gets compiled: its shapes never change, it asks nothing of the host, and it branches only on the plan's
numbers and on ``moment.kind``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kvpolicy.attention import (
    Formula,
    attend_pages,
    attend_part,
    attend_shared,
    attend_slots,
    merge_parts,
    sink_part,
)
from kvpolicy.attention.backends import TRITON
from kvpolicy.attention.kernels.library import attend_pages as kernel_pages
from kvpolicy.attention.kernels.ops import attend_slots as decode_attention
from kvpolicy.runtime.core import LayerCore
from kvpolicy.runtime.evict import drop_some, fires, record_size
from kvpolicy.runtime.moment import UPDATE
from kvpolicy.runtime.pool import readings
from kvpolicy.runtime.reading import read_slots
from kvpolicy.runtime.stored import settle
from kvpolicy.scorers.sight import NewestQuery, Sight, masked_softmax


class TokenPass(LayerCore):
    """A layer that takes generated passes."""

    def take(self, query: Tensor, key: Tensor, value: Tensor, formula: Formula, kind: str) -> Tensor:
        """One token a row: query [B, Q, 1, D], key and value [B, K, 1, D]; its attention [B, 1, Q, D], or numbers of no
        meaning where that comes later (``ahead``)."""
        state = self.state
        if "queries" in state.tensors:
            self._remember_query(query)
        if self.fused is not None:
            return self.fused(query, key, value, formula.scaling, kind == UPDATE)
        self._admit(key, value)
        turned: Tensor | None = None
        if self.compact is not None:
            newest = self.clocks.position[:, None]
            query, turned = self.compact.at_ranks(query, newest, state.all_keys(), state.position)
        grouped = rearrange(query, "b (k g) 1 d -> b k g d", k=state.keys.shape[1])
        attend = self._attend_to_chosen if self.readers or self.plan.shared else self._attend_to_all
        out, sight = attend(grouped, turned, formula, kind)
        self._learn_and_drop(sight, kind == UPDATE)
        if self.arrival is not None and self.arrival.store is not None:
            settle(state, self.arrival)
        return rearrange(out, "b k g d -> b 1 (k g) d")

    def _attend_to_all(
        self, query: Tensor, turned: Tensor | None, formula: Formula, kind: str
    ) -> tuple[Tensor, NewestQuery]:
        """Step 3 where every resident is read: attention of one query a row [B, K, G, D]."""
        state, wanted = self.state, self.reads_logits[kind]
        sight = NewestQuery(state, formula, {}, query, turned=turned)
        if self.ahead is not None:
            sight.all_logits, sight.probabilities = self.ahead.attend(state.position < 0)
            self.ahead.pay(sight.probabilities)
            return query, sight
        keys, values = sight.keys, state.all_values()
        if self.backend == TRITON:
            out, logits = decode_attention(query, keys, values, state.position, formula.scaling, wanted)
            if wanted:
                sight.all_logits, sight.probabilities = logits, torch.softmax(logits, dim=-1)
        elif wanted or not formula.plain:
            out, sight.all_logits, sight.probabilities = attend_slots(query, keys, values, state.position < 0, formula)
        else:
            visible = (state.position >= 0)[:, :, None]
            out = F.scaled_dot_product_attention(query, keys, values, visible, scale=formula.scaling)
        return out, sight

    def _attend_to_chosen(
        self, query: Tensor, turned: Tensor | None, formula: Formula, kind: str
    ) -> tuple[Tensor, NewestQuery]:
        """Steps 2 and 3 where pools select, or heads share slots: attention of one query a row [B, K, G, D] over what
        is read.

        Unless a scorer needs the logits of every slot, those that are not read are never touched.
        """
        state, clocks = self.state, self.clocks
        hidden = state.position < 0
        sight = NewestQuery(state, formula, {}, query, turned=turned)
        if self.ahead is not None:
            sight.all_logits, sight.probabilities = self.ahead.attend(hidden)
        elif self.reads_logits[kind] or any(reader.reads_logits for reader in self.readers):
            sight = NewestQuery.of(state, query, hidden, formula, turned)
        values = readings(state, clocks)
        chosen = {reader.name: reader.choose(state, clocks, values, sight) for reader in self.readers}
        sight.candidates = {}
        if self.shows_reading:
            self.chosen, self.attended = chosen, state.position.clone()
        if self.reads_logits[kind] or self.ahead is not None:
            sight.read = read_slots(state, chosen)
            sight.probabilities = masked_softmax(sight.all_logits, sight.read[:, :, None], formula)
            if self.ahead is not None:
                self.ahead.pay(sight.probabilities)
                return query, sight
            return state.mix(sight.probabilities), sight
        parts = []
        for pools in self.stretches:
            span = slice(pools[0].offset, pools[-1].offset + pools[-1].capacity)
            whole = pools[0].store is None
            keys = (state.keys if turned is None else turned)[:, :, span] if whole else sight.keys_of(pools[0])
            given = (query, keys, state.values[:, :, span] if whole else state.pool_values(pools[0]))
            if pools[0].name in chosen:
                index = chosen[pools[0].name].int()
                parts.append(self._attend_pages(*given, state.position[:, :, span], index, pools[0].page, formula))
            else:
                parts.append(attend_part(*given, hidden[:, :, span], formula))
        parts += [attend_shared(query, keys, values, owner, formula) for keys, values, owner in state.shared_slots]
        sink = formula.sink(query.shape[1])
        if sink is not None:
            parts.append(sink_part(parts[0][0], sink))
        return merge_parts(*zip(*parts, strict=True))[0] if len(parts) > 1 else parts[0][0], sight

    def _attend_pages(
        self, query: Tensor, keys: Tensor, values: Tensor, position: Tensor, index: Tensor, page: int, formula: Formula
    ) -> tuple[Tensor, Tensor]:
        if self.backend == TRITON:
            return kernel_pages(query, keys, values, position, index, page, formula.scaling)
        return attend_pages(query, keys, values, position, index, page, formula)

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
        if self.ahead is not None:
            self.ahead.enter(slot[2], value[:, :, 0])
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
