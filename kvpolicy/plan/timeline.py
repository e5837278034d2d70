"""How many tokens a layer keeps at every step, counted by hand from a plan: one row, one KV head, one prompt turn.

Which tokens stay depends on their scores; how many does not. Nothing here needs a model, or any array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor

from kvpolicy.language import Quantity
from kvpolicy.plan.structure import LayerPlan, Plan, PoolPlan


@dataclass
class PoolTimeline:
    """One pool by step t (0 is the end of the prompt), in tokens.

    resident: after the step's update, where it had one. budget: what the budget allowed at its last update, None before
    the first one and where there is no budget. evicted: how many have left in all. first_eviction: the t of the first.
    first and window: how many were safe by name and by age at the last update.
    """

    name: str
    resident: list[int] = field(default_factory=list)
    budget: list[int | None] = field(default_factory=list)
    evicted: int = 0
    first_eviction: int | None = None
    first: int = 0
    window: int = 0

    @property
    def budgets(self) -> list[tuple[int, int]]:
        """Where the budget changes: (t, tokens)."""
        known = [(t, tokens) for t, tokens in enumerate(self.budget) if tokens is not None]
        return [known[i] for i in range(len(known)) if i == 0 or known[i][1] != known[i - 1][1]]


def timeline(plan: Plan, layer: LayerPlan) -> list[PoolTimeline]:
    """The pools of a layer, in reading order, from the end of the longest prompt to the last generated token.

    Special tokens and images are taken to be absent. Pools that another feeds are counted as if each moved unit stayed
    whole.
    """
    return _Count(plan, layer).run(plan.max_new_tokens)


class _Count:
    def __init__(self, plan: Plan, layer: LayerPlan) -> None:
        self.pools = [_Pool(pool) for pool in layer.pools]
        self.order = [self.pools[index] for index in layer.order]
        self.by_name = {pool.plan.name: pool for pool in self.pools}
        self.longest, self.chunk = plan.prompt[1], plan.prompt_chunk or max(1, plan.prompt[1])
        self.prompt = self.t = 0

    def run(self, steps: int) -> list[PoolTimeline]:
        for start in range(0, max(1, self.longest), self.chunk):
            tokens = min(self.chunk, self.longest - start)
            self.prompt += tokens
            self._pass("prompt", tokens)
        self._note()
        for t in range(1, steps + 1):
            self.t = t
            self._pass("generated", 1)
            self._note()
        return [pool.line for pool in self.pools]

    def _pass(self, kind: str, tokens: int) -> None:
        taker = next((pool for pool in self.pools if kind in pool.plan.admits), None)
        if taker is not None and tokens:
            taker.admit(tokens)
        for pool in self.order:
            cadence = pool.plan.cadence
            if kind == "prompt" or (cadence and self.t % cadence == 0):
                self._update(pool)

    def _note(self) -> None:
        for pool in self.pools:
            pool.note()

    def _update(self, pool: _Pool) -> None:
        values = {"t": self.t, "prompt_len": self.prompt, "context": self.prompt + self.t}
        for other in self.pools:
            values[f"size({other.plan.name})"] = other.size
            values[f"seen({other.plan.name})"] = other.seen
        dropped = pool.drop(values, self.t)
        if dropped and pool.plan.to is not None:
            self.by_name[pool.plan.to].receive(dropped * pool.plan.page)


class _Pool:
    """A pool as counts: units resident, tokens ever admitted, and units that were there at the last update."""

    def __init__(self, plan: PoolPlan) -> None:
        self.plan = plan
        self.line = PoolTimeline(plan.name)
        self.units = self.seen = self.old = self.size = 0
        self.allowed: int | None = None
        self._known: dict[tuple[Quantity, tuple[int, ...]], int] = {}

    def admit(self, tokens: int) -> None:
        before = self._pages(self.seen)
        self.seen += tokens
        self.units += self._pages(self.seen) - before

    def receive(self, tokens: int) -> None:
        self.seen += tokens
        self.units += self._pages(tokens)

    def drop(self, values: Mapping[str, int], t: int) -> int:
        """Units that leave at an update."""
        dropped = 0
        if self.plan.budget is not None:
            self.allowed = self._value(self.plan.budget, values)
            excess = self._pages(max(0, self.units * self.plan.page - self.allowed))
            dropped = min(excess, self._unprotected(values))
        self.units -= dropped
        self.old, self.size = self.units, self.units * self.plan.page
        if dropped:
            self.line.evicted += dropped * self.plan.page
            if self.line.first_eviction is None:
                self.line.first_eviction = t
        return dropped

    def note(self) -> None:
        missing = -self.seen % self.plan.page if self.plan.admits else 0  # of the newest page, which never leaves
        self.line.resident.append(max(0, self.units * self.plan.page - missing))
        self.line.budget.append(self.allowed)

    def _unprotected(self, values: Mapping[str, int]) -> int:
        """Units that may leave: neither among the first ones, nor in the window, nor the newest page, nor survivors."""
        plan, total = self.plan, self._pages(self.seen)
        pinned = 0 if plan.first is None else self._value(plan.first, values)
        window = 0 if plan.window is None else self._value(plan.window, values)
        self.line.first, self.line.window = pinned, window
        first = min(total, self._pages(pinned))
        start = max(0, self.seen - window) // plan.page if window else total
        if plan.page > 1:
            start = min(start, max(0, total - 1))
        if plan.pin_survivors and self.old:
            return max(0, self.units - self.old - (total - start))
        return max(0, self.units - (total - max(0, start - first)))

    def _value(self, quantity: Quantity, values: Mapping[str, int]) -> int:
        """The quantity floored, and 0 where it is less; the same question is computed once."""
        question = (quantity, tuple(values[name] for name in sorted(quantity.names)))
        if question not in self._known:
            self._known[question] = max(0, floor(quantity.evaluate({k: Fraction(v) for k, v in values.items()})))
        return self._known[question]

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.plan.page)
