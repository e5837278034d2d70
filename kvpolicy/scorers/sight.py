"""What a scorer can see of a pass: the queries that score, the slots, and who may be dropped.

Three kinds: ``NewestQuery`` sees one query a row (every generated pass; ``queries: current`` of a prompt pass),
``EveryQuery`` sums over all queries of a prompt pass, and ``LastQueries`` averages over a row's newest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from kvpolicy.attention import (
    Formula,
    Reduce,
    column_sums,
    prompt_scores,
    reduce_heads,
    scaled_logits,
    shared_logits,
    sink_softmax,
)
from kvpolicy.errors import UsageError
from kvpolicy.plan import PoolPlan, ScorerPlan

# ``attention.columns.prompt_scores``, or another backend's.
PromptScores = Callable[[Tensor, Tensor, Tensor, Tensor, Formula, str, str], Tensor]


@dataclass(frozen=True)
class Leaf:
    """A leaf of a scorer with plain numbers for the graph; ``number`` and its ``pool`` name its buffers."""

    number: int
    pool: str
    signal: str
    args: dict[str, Any]
    queries: str
    over: str
    heads: str
    smooth: tuple[str, int] | None
    norm: str | None
    hit: tuple[str, Any] | None
    memory: str
    memory_value: float
    weight: float

    @property
    def ranks_cache(self) -> bool:
        """Whether its hits are the best of the units of all pools of the layer."""
        return self.hit is not None and self.hit[0] == "top" and self.over == "cache"

    @property
    def last(self) -> int:
        """w of ``queries: {last: w}``; 0 for the other kinds."""
        return int(self.queries) if self.queries.isdigit() else 0

    @classmethod
    def of(cls, plan: ScorerPlan, number: int, pool: str) -> Leaf:
        hit: tuple[str, Any] | None = None
        if plan.hit is not None:
            kind, value = plan.hit
            hit = (kind, float(value) if isinstance(value, Fraction) else value.tree)
        return cls(
            number=number,
            pool=pool,
            signal=plan.signal,
            args=dict(plan.args),
            queries=str(plan.queries),
            over=plan.over,
            heads=plan.heads,
            smooth=plan.smooth,
            norm=plan.norm,
            hit=hit,
            memory=plan.memory[0],
            memory_value=float(plan.memory[1] or 0),
            weight=float(plan.weight),
        )


@dataclass
class Sight:
    """The slots as scorers see them, in one layer and pass.

    ``state`` offers keys, values, positions and buffers (``runtime.state.LayerState``); wherever S counts all slots of
    a layer, those that heads share come last. ``candidates`` maps a pool's
    name to its unprotected resident units [B, K, U]; ``read`` are the slots [B, K, S] that the pass reads, None
    where it reads all; ``turned`` are the keys at their ranks [B, K, S, D], where positions are compact.
    """

    state: Any
    formula: Formula
    candidates: dict[str, Tensor] = field(default_factory=dict)
    read: Tensor | None = field(default=None, kw_only=True)
    turned: Tensor | None = field(default=None, kw_only=True)

    def attention(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        """Attention mass on the tokens of a pool, heads reduced: [B, K, U * page]."""
        raise NotImplementedError

    def logits(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        """Scaled q.k on the tokens of a pool, heads reduced: [B, K, U * page]; 0 where a slot is empty."""
        raise NotImplementedError

    def bounds(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        """Upper bound of the scaled q.k of each page, heads reduced: [B, K, U]."""
        raise NotImplementedError

    def domain(self, pool: PoolPlan, leaf: Leaf) -> Tensor | None:
        """The slots [B, K, S] over which ``over`` takes the softmax, as far as they are read; None for all."""
        if leaf.over == "cache":
            return self.read
        inside = torch.zeros_like(self.state.all_positions, dtype=torch.bool)
        units = self.candidates[pool.name] if leaf.over == "candidates" else self.state.resident_units(pool)
        inside[:, :, self.state.span(pool)] = units[..., None].expand(-1, -1, -1, pool.page).flatten(2)
        return inside if self.read is None else inside & self.read

    def summed(self, pool: PoolPlan, leaf: Leaf, reduce: Reduce) -> Tensor:
        """Any signal of queries, heads reduced: [B, K, U * page].

        ``reduce`` maps masked float32 logits [H, G, n, S] (H of the B * K rows and KV heads, which ones ``some`` says;
        -inf where a query sees no token) to what each of the n queries says of each slot, [H, G', n, S]. That is then
        summed over the queries (``all``), averaged (``{last: w}``), or is that of the one query there is.
        """
        raise NotImplementedError

    @property
    def keys(self) -> Tensor:
        """Keys of the layer by slot [B, K, S, D], as attention reads them."""
        keys: Tensor = self.state.all_keys() if self.turned is None else self.turned
        return keys

    def box(self, pool: PoolPlan) -> tuple[Tensor, Tensor]:
        """Channel-wise greatest and least of the keys of each page, twice [B, K, U, D]."""
        if self.turned is None:
            return self.state.tensors[f"{pool.name}.high"], self.state.tensors[f"{pool.name}.low"]
        keys = self.turned[:, :, self.state.span(pool)].unflatten(2, (pool.units, pool.page))
        held = (self.state.pool_positions(pool) >= 0)[..., None]
        high, low = (keys.masked_fill(~held, end) for end in (float("-inf"), float("inf")))
        return tuple(torch.where(held.any(3), edge, 0.0) for edge in (high.amax(3), low.amin(3)))  # type: ignore[return-value]

    def all_keys(self) -> Tensor:
        """Keys of the layer by slot [B, K, S, D] in float32."""
        return self.keys.float()

    def by_slot(self) -> list[tuple[Tensor, float]]:
        """What is known of each slot of the cache, the slots last, and what stands where there is none."""
        return []

    def keys_of(self, pool: PoolPlan) -> Tensor:
        """Keys of a pool by slot [B, K, U * page, D], as attention reads them."""
        span = self.state.span(pool)
        keys: Tensor = self.state.pool_keys(pool) if self.turned is None else self.turned[:, :, span]
        return keys

    def unit_keys(self, pool: PoolPlan) -> Tensor:
        """The same in float32."""
        return self.keys_of(pool).float()

    def unit_values(self, pool: PoolPlan) -> Tensor:
        """Values of a pool by slot [B, K, U * page, D] in float32."""
        values: Tensor = self.state.pool_values(pool)
        return values.float()


def masked_softmax(logits: Tensor, domain: Tensor | None, formula: Formula | None = None) -> Tensor:
    """Softmax over the last dimension within ``domain`` (broadcast); 0 outside, and where nothing is inside.

    With a ``formula``, beside its sinks, which are no token's: what attention itself computes, and not what a softmax
    over some of the tokens means. logits are then [B, K, G, ..., S].
    """
    if domain is not None:
        logits = logits.masked_fill(~domain, float("-inf"))
    sink = None if formula is None else formula.sink(logits.shape[1])
    if sink is not None:
        sink = sink.view(*sink.shape, *[1] * (logits.dim() - 3))
    return torch.nan_to_num(sink_softmax(logits, sink), nan=0.0)


def beside_shared(logits: Tensor, state: Any, query: Tensor, formula: Formula) -> Tensor:
    """Logits [B, K, G, S] of queries [B, K, G, D] over the slots that each head has, and behind them those over slots
    that heads share."""
    shared = [shared_logits(query, keys, owner, formula) for keys, _, owner in state.shared_slots]
    return torch.cat([logits, *shared], dim=-1) if shared else logits


def finite(logits: Tensor) -> Tensor:
    """Logits with 0 where a slot is masked."""
    return torch.where(logits.isinf(), 0.0, logits)


@dataclass
class NewestQuery(Sight):
    """One query a row: ``query`` [B, K, G, D]; its masked logits and probabilities [B, K, G, S] over all slots."""

    query: Tensor = None  # type: ignore[assignment]
    all_logits: Tensor = None  # type: ignore[assignment]
    probabilities: Tensor = None  # type: ignore[assignment]
    signed: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls, state: Any, query: Tensor, hidden: Tensor, formula: Formula, turned: Tensor | None = None
    ) -> NewestQuery:
        logits = scaled_logits(query, state.all_keys() if turned is None else turned, hidden, formula)
        logits = beside_shared(logits, state, query, formula)
        return cls(state, formula, {}, query, logits, masked_softmax(logits, None, formula), turned=turned)

    def by_slot(self) -> list[tuple[Tensor, float]]:
        known = ((self.all_logits, float("-inf")), (self.probabilities, 0.0), (self.read, False))
        return [(seen, nothing) for seen, nothing in known if seen is not None]

    def attention(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        self._check_logits(leaf)
        span = self.state.span(pool)
        domain = self.domain(pool, leaf)
        if leaf.heads == "logits-max":
            return masked_softmax(self.all_logits.amax(2), domain)[:, :, span]
        if leaf.over == "cache":
            return reduce_heads(self.probabilities[..., span], leaf.heads)
        assert domain is not None
        return reduce_heads(masked_softmax(self.all_logits, domain[:, :, None])[..., span], leaf.heads)

    def logits(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        self._check_logits(leaf)
        return reduce_heads(finite(self.all_logits[..., self.state.span(pool)]), leaf.heads)

    def summed(self, pool: PoolPlan, leaf: Leaf, reduce: Reduce) -> Tensor:
        self._check_logits(leaf)
        logits, domain = self.all_logits, self.domain(pool, leaf)
        if domain is not None:
            logits = logits.masked_fill(~domain[:, :, None], float("-inf"))
        values = reduce(logits.flatten(0, 1)[:, :, None], slice(None)).squeeze(2)
        return reduce_heads(values.unflatten(0, logits.shape[:2])[..., self.state.span(pool)], leaf.heads)

    def bounds(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        if pool.page == 1:
            return self.logits(pool, leaf)
        high, low = self.box(pool)
        if torch.compiler.is_compiling():  # one fused loop over the bounds
            query = (self.query * self.formula.scaling).float()[:, :, :, None]
            bound = torch.maximum(query * high[:, :, None], query * low[:, :, None]).sum(-1)
            return reduce_heads(self.formula.capped(bound), leaf.heads)
        # The same as two products, so that nothing of shape [B, K, G, U, D] is ever in memory.
        above, below = self._signed_query()
        bound = torch.matmul(above, high.transpose(2, 3)) + torch.matmul(below, low.transpose(2, 3))
        return reduce_heads(self.formula.capped(bound.float()), leaf.heads)

    def _signed_query(self) -> tuple[Tensor, Tensor]:
        """The scaled query's positive part and its negative part, made once for all pools of a pass."""
        if self.signed is None:
            query = self.query * self.formula.scaling
            self.signed = query.clamp(min=0), query.clamp(max=0)
        return self.signed

    def _check_logits(self, leaf: Leaf) -> None:
        """A pass has no logits unless the plan knew that a signal reads them; only a plug-in's can have kept quiet."""
        if self.all_logits is None:
            raise UsageError(
                f"the signal `{leaf.signal}` reads logits, and its definition does not say so: needs logits"
            )


@dataclass
class EveryQuery(Sight):
    """All queries of a prompt pass, summed: ``query`` [B, Q, N, D] at ``query_position`` [B, N] (-1 for padding).

    ``position`` [B, K, S] is the state's while they attended; ``probabilities`` [B, K, G, S] is what they paid to each
    slot of the whole cache, summed, where the pass's attention already found it. ``scores`` is the backend's.
    """

    query: Tensor = None  # type: ignore[assignment]
    query_position: Tensor = None  # type: ignore[assignment]
    position: Tensor = None  # type: ignore[assignment]
    probabilities: Tensor | None = None
    scores: PromptScores = prompt_scores

    def by_slot(self) -> list[tuple[Tensor, float]]:
        known: list[tuple[Tensor, float]] = [(self.position, -1)]
        return known if self.probabilities is None else [*known, (self.probabilities, 0.0)]

    def attention(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        if self.probabilities is not None and sums_probabilities(leaf):
            return reduce_heads(self.probabilities[..., self.state.span(pool)], leaf.heads)
        position = self._seen(pool, leaf)
        formula = self.formula if leaf.over == "cache" else self.formula.over_tokens
        given = (self.query, self.keys, self.query_position, position, formula)
        return self.scores(*given, "attention", leaf.heads)[:, :, 0, self.state.span(pool)]

    def logits(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        span = self.state.span(pool)
        keys, position = self.keys[:, :, span], self.position[:, :, span]
        return self._sum(self.query, keys, position, "logits", leaf.heads)[:, :, 0]

    def summed(self, pool: PoolPlan, leaf: Leaf, reduce: Reduce) -> Tensor:
        position = self._seen(pool, leaf)
        total = column_sums(self.query, self.keys, self.query_position, position, self.formula, reduce)
        return reduce_heads(total[..., self.state.span(pool)], leaf.heads)

    def bounds(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        if pool.page == 1:
            return self.logits(pool, leaf)
        high, low = self.box(pool)
        # A page says nothing to queries before its first token.
        above, below = (
            self._sum(side, box, self.state.unit_position(pool), "logits", "each")
            for side, box in ((self.query.clamp(min=0), high), (self.query.clamp(max=0), low))
        )
        return reduce_heads(above + below, leaf.heads)

    def _seen(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        """Positions [B, K, S] of what the softmax is taken over; -1 elsewhere."""
        domain = self.domain(pool, leaf)
        return self.position if domain is None else torch.where(domain, self.position, -1)

    def _sum(self, query: Tensor, keys: Tensor, position: Tensor, signal: str, heads: str) -> Tensor:
        return self.scores(query, keys, self.query_position, position, self.formula, signal, heads)


@dataclass
class LastQueries(Sight):
    """The newest w queries of each row, averaged (SnapKV, arXiv:2404.14469; R-KV, arXiv:2505.24133).

    ``query`` [B, Q, w, D] at ``query_position`` [B, w], -1 where a row has had fewer. They look at what is resident
    now: ``position`` [B, K, S] is the state's when the pass attended. All at once: w is small.
    """

    query: Tensor = None  # type: ignore[assignment]
    query_position: Tensor = None  # type: ignore[assignment]
    position: Tensor = None  # type: ignore[assignment]

    def by_slot(self) -> list[tuple[Tensor, float]]:
        return [(self.position, -1)]

    def attention(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        def reduce(logits: Tensor, some: slice) -> Tensor:
            if leaf.heads == "logits-max":
                return masked_softmax(logits.amax(1, keepdim=True), None)
            logits = logits.unflatten(0, (*self.query_position.shape[:1], -1))
            return masked_softmax(logits, None, self.formula if leaf.over == "cache" else None).flatten(0, 1)

        return self.summed(pool, leaf, reduce)

    def logits(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        span = self.state.span(pool)
        if pool.shared:
            logits = finite(self._everywhere(self.position)[..., span])
        else:
            logits = finite(self._dot(self.query, self.keys_of(pool), self.position[:, :, span]))
        return reduce_heads(self._mean(logits), leaf.heads)

    def summed(self, pool: PoolPlan, leaf: Leaf, reduce: Reduce) -> Tensor:
        domain = self.domain(pool, leaf)
        position = self.position if domain is None else torch.where(domain, self.position, -1)
        logits = self._everywhere(position)
        values = reduce(logits.flatten(0, 1), slice(None)).unflatten(0, logits.shape[:2])
        return reduce_heads(self._mean(values)[..., self.state.span(pool)], leaf.heads)

    def bounds(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        if pool.page == 1:
            return self.logits(pool, leaf)
        high, low = self.box(pool)
        place = self.state.unit_position(pool)  # a page says nothing to queries before its first token
        above, below = (
            finite(self._dot(side, box, place))
            for side, box in ((self.query.clamp(min=0), high), (self.query.clamp(max=0), low))
        )
        return reduce_heads(self._mean(above + below), leaf.heads)

    def _everywhere(self, position: Tensor) -> Tensor:
        """``_dot`` over every slot of the layer [B, K, G, w, S + shared], at ``position`` [B, K, S + shared]."""
        keys, window = self.keys, self.query.shape[2]
        logits = self._dot(self.query, keys, position[:, :, : keys.shape[2]])
        if not self.state.plan.shared:
            return logits
        grouped = rearrange(self.query, "b (k g) w d -> b k (g w) d", k=keys.shape[1])
        logits = beside_shared(logits.flatten(2, 3), self.state, grouped, self.formula).unflatten(2, (-1, window))
        place = position[:, :, None, None]
        return logits.masked_fill((place < 0) | (place > self.query_position[:, None, None, :, None]), float("-inf"))

    def _dot(self, query: Tensor, keys: Tensor, position: Tensor) -> Tensor:
        """Scaled q.k in float32 [B, K, G, w, S]; -inf where a slot is empty, or its token later than the query."""
        grouped = rearrange(query * self.formula.scaling, "b (k g) w d -> b k (g w) d", k=keys.shape[1])
        logits = self.formula.capped(torch.matmul(grouped, keys.transpose(2, 3)).float())
        logits = logits.unflatten(2, (-1, query.shape[2]))
        place = position[:, :, None, None]
        return logits.masked_fill((place < 0) | (place > self.query_position[:, None, None, :, None]), float("-inf"))

    def _mean(self, values: Tensor) -> Tensor:
        """[B, K, G', w, S] -> [B, K, G', S]: over the queries that a row has had."""
        count = (self.query_position >= 0).sum(1).clamp(min=1)
        return values.sum(3) / count[:, None, None, None]


def sums_probabilities(leaf: Leaf) -> bool:
    """Whether what a leaf reads of a prompt pass are the summed probabilities of the whole cache, head by head."""
    return leaf.queries == "all" and leaf.over == "cache" and leaf.heads != "logits-max"
