"""Claims about how many tokens there are, and when that is decided."""

from __future__ import annotations

from dataclasses import dataclass

from kvpolicy.language import Quantity
from kvpolicy.language.base import Complaint
from kvpolicy.plan import Plan
from kvpolicy.testing.claims.base import Breach, Claim, Moments, claim
from kvpolicy.testing.seen import Seen


@dataclass(kw_only=True)
class Count(Claim):
    """How many tokens there are: at most ``max``, at least ``min``, exactly ``is``.

    Each is a quantity in t, prompt_len, context and the policy's params, floored.
    """

    MAIN = "max"
    max: Quantity | None = None
    min: Quantity | None = None
    is_: Quantity | None = None

    def check(self, plan: Plan, length: int) -> None:
        super().check(plan, length)
        if self.max is None and self.min is None and self.is_ is None:
            raise Complaint("how many?", "as in `{resident: {max: 64}}`")

    def count(self, tokens: frozenset[int], seen: Seen, how: str) -> Breach | None:
        limits = (("at most", self.max), ("at least", self.min), ("exactly", self.is_))
        for words, quantity in limits:
            limit = len(tokens) if quantity is None else seen.evaluate(quantity)
            wrong = {"at most": len(tokens) > limit, "at least": len(tokens) < limit}.get(words, len(tokens) != limit)
            if wrong:
                return Breach(f"{len(tokens)} tokens {how}{self.inside}, {words} {limit} claimed")
        return None


@claim
@dataclass(kw_only=True)
class Resident(Count):
    """Tokens that a KV head holds after each pass, the prompt's included (tokens, where budgets count whole pages)."""

    def judge(self, seen: Seen) -> Breach | None:
        return self.count(seen.kept(self.pool), seen, "resident")


@claim
@dataclass(kw_only=True)
class Peak(Count):
    """Tokens that a KV head holds while a generated token attends, before the update."""

    def judge(self, seen: Seen) -> Breach | None:
        return self.count(seen.held(self.pool), seen, "attended") if seen.step.kind == "generated" else None


@claim
@dataclass(kw_only=True)
class Updates(Claim):
    """When pools that have a budget are updated while tokens are generated: at these moments and no other.

    ``at``: newest positions; ``every``: where t is a multiple of it, 0 for never.
    """

    MAIN = "at"
    at: Moments | None = None
    every: int | None = None

    def check(self, plan: Plan, length: int) -> None:
        super().check(plan, length)
        if (self.at is None) == (self.every is None):
            raise Complaint("when?", "as in `{updates: {every: 8}}` or `{updates: {at: [24, 32]}}`")

    def judge(self, seen: Seen) -> Breach | None:
        if seen.step.kind != "generated":
            return None
        every = self.every or 0
        expected = seen.newest in self.at if self.at is not None else every > 0 and seen.step.t % every == 0
        if seen.updated(self.pool) == expected:
            return None
        found, claimed = ("no", "one") if expected else ("an", "none")
        return Breach(f"{found} update{self.inside}, {claimed} was claimed")
