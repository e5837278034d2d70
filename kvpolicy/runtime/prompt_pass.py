"""A prompt pass of one layer: many tokens a row, through the same five steps, on the turn's workspace. Eager."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kvpolicy.attention import (
    Formula,
    attend_prompt,
    attend_prompt_and_sum,
    newest_queries,
    prompt_scores,
)
from kvpolicy.attention.backends import TRITON
from kvpolicy.attention.kernels.library import prompt_scores as kernel_prompt_scores
from kvpolicy.runtime.core import LayerCore
from kvpolicy.runtime.evict import drop_all_at_once
from kvpolicy.runtime.packing import pack
from kvpolicy.runtime.pool import readings
from kvpolicy.runtime.state import LayerState
from kvpolicy.runtime.turn import Turn
from kvpolicy.scorers.sight import EveryQuery, NewestQuery, Sight


class PromptPass(LayerCore):
    """A layer that takes prompt passes."""

    def _prompt(self, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
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
        out = query
        if self.sums_prompt:
            out, sums = self._attend_and_sum(query, keys, wide, formula)
        elif moment.shown is not None:
            pass
        elif moment.whole and formula.plain:
            grouped = query.shape[1] > key.shape[1]
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=formula.scaling, enable_gqa=grouped
            )
        else:
            out = attend_prompt(query, keys, wide.values, moment.position, wide.position, formula)
        self._learn_and_drop_prompt(query, keys, wide, formula, sums)
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

    def _attend_and_sum(self, query: Tensor, keys: Tensor, wide: LayerState, formula: Formula) -> tuple[Tensor, Tensor]:
        """Attention of a prompt pass, and what its queries paid to each slot [B, K, G, S]."""
        moment = self.moment
        assert moment.position is not None
        pools = [pool for pool in wide.plan.pools if pool.hears_prompts]
        # Where one pool takes them all, and nothing was there before, it holds the pass's own tokens, in order.
        in_order = moment.empty and len(pools) == 1
        span = wide.span(pools[0]) if in_order else slice(None)
        known = moment.shown if in_order else None
        name = ("sums", self.plan.members, wide.position[:, :, span].shape[2])
        out, found = query, None if known is None else known.get(name)
        if found is None:
            out, found = attend_prompt_and_sum(
                query,
                keys[:, :, span],
                wide.values[:, :, span],
                moment.position,
                wide.position[:, :, span],
                formula,
                in_order=in_order,
                padded=not moment.whole,
            )
        if known is not None:
            known[name] = found
        sums = found.new_zeros(*found.shape[:3], wide.position.shape[2])
        sums[..., span] = found
        return out, sums

    def _learn_and_drop_prompt(
        self, query: Tensor, keys: Tensor, wide: LayerState, formula: Formula, sums: Tensor | None
    ) -> None:
        """Steps 4 and 5 of a prompt pass, on the turn's workspace; only the turn's last pass drops."""
        clocks, last = self.clocks, not self.moment.more
        working = [self.policies[pool.name] for pool in self.ordered if pool.evicts]
        if not last and not any(policy.remembers for policy in working):
            return
        values = readings(wide, clocks)
        candidates = {policy.name: policy.candidates(wide, clocks, values) for policy in working}
        sights, active = self._prompt_sights(query, keys, wide, formula, candidates, sums)
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
        formula: Formula,
        candidates: dict[str, Tensor],
        sums: Tensor | None,
    ) -> tuple[dict[str, Sight], Tensor]:
        """What scorers see of the prompt pass, and which rows [B] brought any token."""
        position = self.moment.position
        assert position is not None
        active = (position >= 0).any(1)
        before = wide.position.clone()  # what queries saw, whatever other pools drop before a pool's turn comes
        scores = _scores_by_kernel if self.backend == TRITON else prompt_scores
        turned = None if self.compact is None else keys
        every = EveryQuery(wide, formula, candidates, query, position, before, sums, scores, turned=turned)
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
        current = NewestQuery.of(wide, one, hidden, formula, turned)
        current.candidates = candidates
        return {"current": current, **sights}, active


def _scores_by_kernel(
    query: Tensor, keys: Tensor, query_position: Tensor, key_position: Tensor, formula: Formula, signal: str, heads: str
) -> Tensor:
    return kernel_prompt_scores(query, keys, query_position, key_position, formula.scaling, signal, heads)
