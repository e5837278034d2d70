"""One pool of one layer at work: who is protected, what each unit is worth, how many must go."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy.plan import PoolPlan, ScorerPlan, scoring_leaves
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.quantities import Whole, floored, share_of
from kvpolicy.runtime.state import LayerState
from kvpolicy.scorers import SIGNALS, find
from kvpolicy.scorers.memory import CLOCKED, fold, recall
from kvpolicy.scorers.place import drawn
from kvpolicy.scorers.sight import Leaf, Sight

LAST_KEY = torch.iinfo(torch.int64).max
FIRST_KEY = torch.iinfo(torch.int64).min


class PoolPolicy:
    """The answers of one pool, ready for the graph: plain numbers, nested tuples and functions, no tensors.

    How many units the pool has is asked of the state at hand: a prompt turn's workspace is wider than the slots.
    """

    def __init__(self, plan: PoolPlan) -> None:
        self.name = plan.name
        self.scorer = plan.scorer
        self.leaves = [Leaf.of(leaf, number, plan.name) for number, leaf in enumerate(scoring_leaves(plan))]
        self._know(plan)

    @classmethod
    def reading(cls, plan: PoolPlan) -> PoolPolicy:
        """The same for what ``read`` ranks by; its leaves remember nothing and own no buffers, so count below 0."""
        assert plan.read is not None
        self = cls.__new__(cls)
        self.name = plan.name
        self.scorer = plan.read.scorer
        self.leaves = [Leaf.of(leaf, -1 - number, plan.name) for number, leaf in enumerate(self.scorer.leaves())]
        self._know(plan)
        return self

    def _know(self, plan: PoolPlan) -> None:
        for leaf in self.leaves:
            find(leaf.signal)
        self.budget = plan.budget.tree if plan.budget is not None else None
        self.window = plan.window.tree if plan.window is not None else None
        self.first = plan.first.tree if plan.first is not None else None
        self.remembers = any(leaf.memory != "none" and not leaf.last for leaf in self.leaves)
        """Whether it folds every pass it observes into a memory."""
        self.windows = {leaf.last for leaf in self.leaves if leaf.last}
        limits = (plan.window, plan.first)
        self.guards_by_size = any(name.startswith("size(") for limit in limits if limit for name in limit.names)

    def candidates(self, state: LayerState, clocks: Clocks, values: Mapping[str, Whole]) -> Tensor:
        """Resident units that may be dropped [B, K, U]: those that no window, pin or open page protects."""
        pool = state.pools[self.name]
        clock = clocks.streams[pool.stream]
        free = state.resident_units(pool)
        if pool.needs_ordinals:
            ordinal = state.tensors[f"{pool.name}.ordinal"]
            if self.window is not None:
                edge = clock.seen[:, None] - floored(self.window, values)
                free = free & _whole_units(pool, state, ordinal < _each(edge))
            if self.first is not None:
                free = free & _whole_units(pool, state, ordinal >= _each(floored(self.first, values)))
        if pool.pin_special:
            free = free & _whole_units(pool, state, ~clocks.is_special(state.pool_positions(pool).flatten(2)))
        if pool.fed and (self.window is not None or self.first is not None):
            free = free & ~self._guarded_by_place(pool, state, values)
        elif pool.page > 1 and not pool.fed:
            free[state.rows, state.heads, state.newest_unit(pool)] = False
        if pool.pin_survivors:
            free = free & ~state.tensors[f"{pool.name}.survivor"]
        return free

    def _guarded_by_place(self, pool: PoolPlan, state: LayerState, values: Mapping[str, Whole]) -> Tensor:
        """Which units of a fed pool hold one of the first tokens by position, or of the newest [B, K, U]."""
        position = state.pool_positions(pool).flatten(2)
        resident = position >= 0
        order = torch.where(resident, position.long(), LAST_KEY).argsort(-1)
        place, count = order.argsort(-1), resident.sum(-1, keepdim=True)
        safe = torch.zeros_like(resident)
        if self.first is not None:
            safe = safe | (place < _each(floored(self.first, values)))
        if self.window is not None:
            safe = safe | (place >= count - _each(floored(self.window, values)))
        return (safe & resident).unflatten(2, (pool.units, pool.page)).any(-1)

    def arrive(self, state: LayerState, clocks: Clocks, unit: Tensor, here: Tensor) -> None:
        """Units [B, K, V] have moved here from another pool, where ``here`` [B, K, V]: they remember nothing."""
        pool = state.pools[self.name]
        index = (state.rows[..., None], state.heads[..., None], unit)
        start = clocks.t[:, None, None].expand_as(unit)
        fresh: list[tuple[str, Tensor]] = []
        for leaf in self.leaves:
            if leaf.memory != "none":
                begins = start if leaf.memory in CLOCKED else torch.zeros_like(start)
                fresh.append((f"{pool.name}.memory.{leaf.number}", begins))
            if leaf.memory == "recurrence":
                fresh.append((f"{pool.name}.gap.{leaf.number}", torch.zeros_like(start)))
            if leaf.signal == "random":
                place = state.unit_position(pool)[index].long()
                seed = int(leaf.args.get("seed", 0))
                number = drawn(seed, state.layer, state.kv_heads[..., None].expand_as(place), place)
                fresh.append((f"{pool.name}.drawn.{leaf.number}", number))
        if pool.pin_survivors and pool.evicts:
            fresh.append((f"{pool.name}.survivor", torch.zeros_like(here)))
        for name, value in fresh:
            tensor = state.tensors[name]
            tensor[index] = torch.where(here, value.to(tensor.dtype), tensor[index])

    def enter(self, state: LayerState, clocks: Clocks, unit: Tensor, opens: Tensor | None) -> None:
        """A unit [B, K] takes one more token: a new unit forgets who lay there before."""
        pool, rows, heads = state.pools[self.name], state.rows, state.heads
        for leaf in self.leaves:
            if leaf.memory in CLOCKED:
                start: Tensor | float = clocks.t[:, None].to(torch.int32)
            else:
                start = 0.0
            stale = [(f"{pool.name}.memory.{leaf.number}", start)] if leaf.memory != "none" else []
            if leaf.memory == "recurrence":
                stale.append((f"{pool.name}.gap.{leaf.number}", 0))
            if leaf.signal == "random":
                seed = int(leaf.args.get("seed", 0))
                position = clocks.position[:, None].long().expand_as(unit)
                stale.append((f"{pool.name}.drawn.{leaf.number}", drawn(seed, state.layer, state.kv_heads, position)))
            for name, fresh in stale:
                tensor = state.tensors[name]
                if not isinstance(fresh, Tensor):
                    fresh = torch.full_like(unit, fresh, dtype=tensor.dtype)
                fresh = fresh.expand_as(unit)
                if opens is not None:
                    fresh = torch.where(opens[:, None], fresh, tensor[rows, heads, unit])
                tensor[rows, heads, unit] = fresh
        if pool.pin_survivors and pool.evicts:
            survivor = state.tensors[f"{pool.name}.survivor"]
            joined = torch.zeros_like(unit, dtype=torch.bool)
            if opens is not None:  # who joins a page that has survived does not endanger it
                joined = survivor[rows, heads, unit] & ~opens[:, None]
            survivor[rows, heads, unit] = joined

    def observe(
        self,
        sights: Mapping[str, Sight],
        clocks: Clocks,
        values: Mapping[str, Whole],
        active: Tensor | None = None,
    ) -> None:
        """Fold this pass into every memory.

        In a prompt pass rows that are not ``active`` [B] brought no token and remember nothing, and neither does a unit
        that is still empty: the turn's workspace is laid out before its tokens come.
        """
        for leaf in self.leaves:
            if leaf.memory != "none" and not leaf.last:
                sight = sights[leaf.queries]
                score = self.pass_score(leaf, sight, values)
                units = None
                if active is not None:
                    units = active[:, None, None] & sight.state.resident_units(sight.state.pools[self.name])
                fold(leaf, *self._memory(sight.state, leaf), score, clocks.t, units)

    def look_back(
        self, sights: Mapping[str, Sight], clocks: Clocks, values: Mapping[str, Whole], rows: Tensor | None
    ) -> None:
        """Fold what ``queries: {last: w}`` says into its memories: only where the pool updates, in ``rows`` [B]."""
        for leaf in self.leaves:
            if leaf.memory != "none" and leaf.last:
                sight = sights[leaf.queries]
                units = sight.state.resident_units(sight.state.pools[self.name])
                if rows is not None:
                    units = units & rows[:, None, None]
                score = self.pass_score(leaf, sight, values)
                fold(leaf, *self._memory(sight.state, leaf), score, clocks.t, units)

    def score(self, sights: Mapping[str, Sight], clocks: Clocks, values: Mapping[str, Whole]) -> Tensor:
        """What each unit is worth at an update, float32 [B, K, U]."""
        numbered = iter(self.leaves)

        def combined(plan: ScorerPlan) -> Tensor:
            if plan.op != "leaf":
                parts = [combined(part) for part in plan.parts]
                total = parts[0]
                for part in parts[1:]:
                    total = total + part if plan.op == "sum" else total * part
                return total * float(plan.weight)
            leaf = next(numbered)
            sight = sights[leaf.queries]
            if leaf.memory == "none":
                value = self.pass_score(leaf, sight, values)
            else:
                value = recall(leaf, *self._memory(sight.state, leaf), clocks.t)
            return value if leaf.weight == 1.0 else value * leaf.weight

        return combined(self.scorer)

    def _memory(self, state: LayerState, leaf: Leaf) -> tuple[Tensor, Tensor | None]:
        name = self.name
        return state.tensors[f"{name}.memory.{leaf.number}"], state.tensors.get(f"{name}.gap.{leaf.number}")

    def pass_score(self, leaf: Leaf, sight: Sight, values: Mapping[str, Whole]) -> Tensor:
        """One leaf's value of this pass [B, K, U]: signal, smooth, norm, hit."""
        if leaf.ranks_cache:
            return self._hits_of_cache(leaf, sight, values)
        pool = sight.state.pools[self.name]
        score = self._prepared(leaf, pool, sight, values)
        if leaf.hit is None:
            return score
        if leaf.hit[0] == "above":
            return (score >= leaf.hit[1]).float()
        ranked = sight.candidates[self.name] if leaf.over == "candidates" else sight.state.resident_units(pool)
        return best(score, sight.state.unit_position(pool), ranked, leaf.hit[1], values).float()

    def _hits_of_cache(self, leaf: Leaf, sight: Sight, values: Mapping[str, Whole]) -> Tensor:
        """Hits among the units of all pools of the layer."""
        state, pools = sight.state, sight.state.plan.pools
        scores = torch.cat([self._rival(leaf, pool, sight, values) for pool in pools], dim=2)
        places = torch.cat([state.unit_position(pool) for pool in pools], dim=2)
        hits = best(scores, places, places >= 0, leaf.hit[1], values)  # type: ignore[index]
        start = 0
        for pool in pools:
            if pool.name == self.name:
                return hits[:, :, start : start + pool.units].float()
            start += pool.units
        raise AssertionError(self.name)

    def _rival(self, leaf: Leaf, pool: PoolPlan, sight: Sight, values: Mapping[str, Whole]) -> Tensor:
        """What this pool's scorer says of the units of any pool. Only its own can be candidates, and smooth and norm
        leave nothing of the others."""
        if pool.name != self.name and (leaf.smooth is not None or leaf.norm is not None):
            return torch.zeros_like(sight.state.unit_position(pool), dtype=torch.float32)
        return self._prepared(leaf, pool, sight, values)

    def _prepared(self, leaf: Leaf, pool: PoolPlan, sight: Sight, values: Mapping[str, Whole]) -> Tensor:
        score = SIGNALS[leaf.signal](sight, pool, leaf)
        if leaf.smooth is not None:
            score = smoothed(score, sight.state.unit_position(pool), sight.candidates[pool.name], *leaf.smooth)
        if leaf.norm is not None:
            score = self._normed(score, leaf.norm, sight, pool, values)
        if leaf.smooth is not None or leaf.norm is not None:  # both know candidates only
            score = score.masked_fill(~sight.candidates[pool.name], 0.0)
        return score

    def _normed(self, score: Tensor, norm: str, sight: Sight, pool: PoolPlan, values: Mapping[str, Whole]) -> Tensor:
        candidate = sight.candidates[pool.name]
        if norm == "softmax":
            logits = score.masked_fill(~candidate, float("-inf"))
            return torch.nan_to_num(torch.softmax(logits, dim=-1), nan=0.0)
        if norm == "max":
            most = score.masked_fill(~candidate, float("-inf")).amax(-1, keepdim=True)
            return score / torch.where((most == 0) | most.isinf(), 1.0, most)
        kept = self.may_stay(sight.state, candidate, values)
        inside = score.masked_fill(~candidate, 0.0)
        ranked = score.masked_fill(~candidate, float("-inf")).sort(-1, descending=True).values
        steps = torch.arange(ranked.shape[-1], device=ranked.device)
        best_sum = torch.where((steps < kept[..., None]) & ~ranked.isinf(), ranked, 0.0).sum(-1, keepdim=True)
        total = inside.sum(-1, keepdim=True)
        return score * torch.where(total == 0, 0.0, best_sum / total)

    def may_stay(self, state: LayerState, candidate: Tensor, values: Mapping[str, Whole]) -> Tensor:
        """How many candidates fit the budget beside what is protected [B, K]."""
        if self.budget is None:
            return candidate.sum(-1)
        pool = state.pools[self.name]
        safe = (state.resident_units(pool) & ~candidate).sum(-1)
        return floored(self.budget, values) // pool.page - safe


def _each(number: Whole) -> Whole:
    """A number by row and KV head, for each unit of the head."""
    return number if isinstance(number, int) else number[..., None]


def _whole_units(pool: PoolPlan, state: LayerState, tokens: Tensor) -> Tensor:
    """Units all of whose resident tokens are among ``tokens`` [B, K, U * page]."""
    if pool.page == 1:
        return tokens
    return (tokens.unflatten(2, (pool.units, pool.page)) | (state.pool_positions(pool) < 0)).all(-1)


def readings(state: LayerState, clocks: Clocks) -> dict[str, Whole]:
    """What the expressions of a layer read, and nothing else: row clocks [B, 1], sizes [B, K]."""
    values: dict[str, Whole] = {}
    if "t" in state.names_read:
        values["t"] = clocks.t[:, None]
    if "prompt_len" in state.names_read:
        values["prompt_len"] = clocks.prompt_len[:, None]
    if "context" in state.names_read:
        values["context"] = (clocks.prompt_len + clocks.t)[:, None]
    for pool in state.plan.pools:
        if f"seen({pool.name})" in state.names_read:
            values[f"seen({pool.name})"] = state.seen(pool)
        if pool.size_read:
            values[f"size({pool.name})"] = state.tensors[f"{pool.name}.size"]
    return values


def order_keys(score: Tensor, place: Tensor, allowed: Tensor, otherwise: int) -> Tensor:
    """A total order as int64: the float32 score, then the position; ``otherwise`` where not ``allowed``.

    The bits of a float compare like integers once the negative ones are flipped; + 0.0 makes -0.0 equal to 0.0.
    """
    bits = (score.float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return torch.where(allowed, torch.add(place, ordered.long(), alpha=1 << 32), otherwise)


def best(score: Tensor, place: Tensor, ranked: Tensor, share: tuple, values: Mapping[str, Whole]) -> Tensor:
    """Which units are among the ceil(share * n) best of the n ``ranked`` ones; the newer wins a tie."""
    keys = order_keys(score, place, ranked, FIRST_KEY)
    winners = share_of(share, ranked.sum(-1), values).clamp(min=0, max=keys.shape[-1])
    ordered = keys.sort(-1, descending=True).values
    least = ordered.gather(-1, (winners - 1).clamp(min=0)[..., None])
    return ranked & (keys >= least) & (winners[..., None] > 0)


def smoothed(score: Tensor, place: Tensor, candidate: Tensor, kind: str, width: int) -> Tensor:
    """Pool over neighbouring candidates in order of position, the ends padded with 0 (SnapKV, arXiv:2404.14469)."""
    order = torch.where(candidate, place.long(), LAST_KEY).argsort(-1)
    line = score.masked_fill(~candidate, 0.0).gather(-1, order)
    padded = F.pad(line, (width // 2, width // 2))
    pooled = F.max_pool1d(padded, width, 1) if kind == "max" else F.avg_pool1d(padded, width, 1)
    return pooled.gather(-1, order.argsort(-1))
