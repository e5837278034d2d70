"""What a scorer can see of a pass: the queries that score, the slots, and who may be dropped.

Two kinds: ``NewestQuery`` sees one query a row (every generated pass; ``queries: current`` of a prompt pass), and
``EveryQuery`` sums over all queries of a prompt pass in tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from kvpolicy.attention import prompt_scores, reduce_heads, scaled_logits
from kvpolicy.errors import UsageError
from kvpolicy.plan import PoolPlan, ScorerPlan

# ``attention.columns.prompt_scores``, or another backend's.
PromptScores = Callable[[Tensor, Tensor, Tensor, Tensor, float, str, str], Tensor]


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

    ``state`` offers keys, values, positions and buffers (``runtime.state.LayerState``); ``candidates`` maps a pool's
    name to its unprotected resident units [B, K, U].
    """

    state: Any
    scaling: float
    candidates: dict[str, Tensor] = field(default_factory=dict)

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
        """The slots [B, K, S] over which ``over`` takes the softmax; None for the whole cache."""
        if leaf.over == "cache":
            return None
        inside = torch.zeros_like(self.state.position, dtype=torch.bool)
        units = self.candidates[pool.name] if leaf.over == "candidates" else self.state.resident_units(pool)
        inside[:, :, self.state.span(pool)] = units[..., None].expand(-1, -1, -1, pool.page).flatten(2)
        return inside

    def unit_keys(self, pool: PoolPlan) -> Tensor:
        """Keys of a pool by slot [B, K, U * page, D] in float32."""
        return self.state.keys[:, :, self.state.span(pool)].float()

    def unit_values(self, pool: PoolPlan) -> Tensor:
        """Values of a pool by slot [B, K, U * page, D] in float32."""
        return self.state.values[:, :, self.state.span(pool)].float()


def masked_softmax(logits: Tensor, domain: Tensor | None) -> Tensor:
    """Softmax over the last dimension within ``domain`` (broadcast); 0 outside, and where nothing is inside."""
    if domain is not None:
        logits = logits.masked_fill(~domain, float("-inf"))
    return torch.nan_to_num(torch.softmax(logits, dim=-1), nan=0.0)


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
    def of(cls, state: Any, query: Tensor, hidden: Tensor, scaling: float) -> NewestQuery:
        logits = scaled_logits(query, state.keys, hidden, scaling)
        return cls(state, scaling, {}, query, logits, masked_softmax(logits, None))

    def attention(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        self._check_logits(leaf)
        span = self.state.span(pool)
        domain = self.domain(pool, leaf)
        if leaf.heads == "logits-max":
            return masked_softmax(self.all_logits.amax(2), domain)[:, :, span]
        if domain is None:
            return reduce_heads(self.probabilities[..., span], leaf.heads)
        return reduce_heads(masked_softmax(self.all_logits, domain[:, :, None])[..., span], leaf.heads)

    def logits(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        self._check_logits(leaf)
        return reduce_heads(finite(self.all_logits[..., self.state.span(pool)]), leaf.heads)

    def bounds(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        if pool.page == 1:
            return self.logits(pool, leaf)
        high, low = self.state.tensors[f"{pool.name}.high"], self.state.tensors[f"{pool.name}.low"]
        if torch.compiler.is_compiling():  # one fused loop over the bounds
            query, high, low = (self.query * self.scaling).float()[:, :, :, None], high[:, :, None], low[:, :, None]
            return reduce_heads(torch.maximum(query * high, query * low).sum(-1), leaf.heads)
        # The same as two products, so that nothing of shape [B, K, G, U, D] is ever in memory.
        above, below = self._signed_query()
        bound = torch.matmul(above, high.transpose(2, 3)) + torch.matmul(below, low.transpose(2, 3))
        return reduce_heads(bound.float(), leaf.heads)

    def _signed_query(self) -> tuple[Tensor, Tensor]:
        """The scaled query's positive part and its negative part, made once for all pools of a pass."""
        if self.signed is None:
            query = self.query * self.scaling
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

    def attention(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        span, domain = self.state.span(pool), self.domain(pool, leaf)
        if self.probabilities is not None and sums_probabilities(leaf):
            return reduce_heads(self.probabilities[..., span], leaf.heads)
        position = self.position if domain is None else torch.where(domain, self.position, -1)
        return self._sum(self.query, self.state.keys, position, "attention", leaf.heads)[:, :, 0, span]

    def logits(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        span = self.state.span(pool)
        keys, position = self.state.keys[:, :, span], self.position[:, :, span]
        return self._sum(self.query, keys, position, "logits", leaf.heads)[:, :, 0]

    def bounds(self, pool: PoolPlan, leaf: Leaf) -> Tensor:
        if pool.page == 1:
            return self.logits(pool, leaf)
        high, low = self.state.tensors[f"{pool.name}.high"], self.state.tensors[f"{pool.name}.low"]
        # A page says nothing to queries before its first token.
        above, below = (
            self._sum(side, box, self.state.unit_position(pool), "logits", "each")
            for side, box in ((self.query.clamp(min=0), high), (self.query.clamp(max=0), low))
        )
        return reduce_heads(above + below, leaf.heads)

    def _sum(self, query: Tensor, keys: Tensor, position: Tensor, signal: str, heads: str) -> Tensor:
        return self.scores(query, keys, self.query_position, position, self.scaling, signal, heads)


def sums_probabilities(leaf: Leaf) -> bool:
    """Whether what a leaf reads of a prompt pass are the summed probabilities of the whole cache, head by head."""
    return leaf.queries == "all" and leaf.over == "cache" and leaf.heads != "logits-max"
