"""Claims about attention: how much of what the full cache would have looked at a policy still holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpolicy.language.base import Complaint
from kvpolicy.plan import Plan
from kvpolicy.testing.arguments import Share
from kvpolicy.testing.claims.base import Breach, Claim, check_moment, claim
from kvpolicy.testing.seen import Seen

ROUNDING = 1e-9
"""Shares are sums of floats."""

SHOWN = 4
"""Lost tokens that a failure names."""


@claim
@dataclass(kw_only=True)
class Mass(Claim):
    """Of the attention that a generated token would pay under the full cache (the mean over the query heads of a KV
    head), the share that goes to tokens that it attends to, resident still and read: at least ``min``, at most ``max``
    for every generated token, at least ``mean`` on average, from the moment ``from`` through ``until``.

    Shares are written `0.9` or `90%`. With ``pool``: of the attention to tokens that the pool admits, what it gives.
    """

    MAIN = "min"
    min: Share | None = None
    max: Share | None = None
    mean: Share | None = None
    from_: int | None = None
    until: int | None = None
    sums: dict[tuple[int, int, int], tuple[float, int]] = field(default_factory=dict, init=False)

    def check(self, plan: Plan, length: int) -> None:
        super().check(plan, length)
        if self.min is None and self.max is None and self.mean is None:
            raise Complaint("how much?", "as in `{mass: {min: 0.9}}` or `{mass: {mean: 90%}}`")
        if not plan.max_new_tokens:
            raise Complaint("no token is generated, and this is a claim about those", "use more `steps`")
        check_moment(self.from_, "from", 0, length)
        check_moment(self.until, "until", self.from_ or 0, length)
        admit = [at.admits for layer in plan.layers for at in layer.pools if at.name == self.pool]
        if self.pool is not None and not any(admit):
            reason = f"pool {self.pool} admits no token: all of its tokens come from other pools"
            raise Complaint(reason, "leave `pool` out", ("pool",))

    def judge(self, seen: Seen) -> Breach | None:
        if seen.step.kind != "generated" or not (self.from_ or 0) <= seen.newest <= self._last(seen):
            return None
        share = seen.full.mass(seen, self.pool)
        total, count = self.sums.get(seen.place, (0.0, 0))
        self.sums[seen.place] = total + share, count + 1
        if self.min is not None and share < self.min - ROUNDING:
            return self._breach(seen, share, "at least", self.min)
        if self.max is not None and share > self.max + ROUNDING:
            return Breach(f"{self._said(share)} is attended{self.inside}, at most {self.max:.4g} claimed")
        mean = (total + share) / (count + 1)
        if self.mean is not None and seen.newest == self._last(seen) and mean < self.mean - ROUNDING:
            return self._breach(seen, mean, "on average at least", self.mean)
        return None

    def _breach(self, seen: Seen, share: float, words: str, claimed: float) -> Breach:
        lost = seen.full.lost(seen, self.pool)[:SHOWN]
        named = ", ".join(f"{token} ({weight:.1%})" for token, weight in lost)
        reason = f"{self._said(share)} is attended{self.inside}, {words} {claimed:.4g} claimed"
        now = "now it would look" if words.startswith("on") else "it would look"
        return Breach(f"{reason}; {now} at {named}" if lost else reason, frozenset(token for token, _ in lost))

    def _last(self, seen: Seen) -> int:
        """The last moment of a row that is looked at: rows differ in length."""
        return seen.last if self.until is None else self.until

    @staticmethod
    def _said(share: float) -> str:
        return f"{share:.4g} of the full cache's attention"
