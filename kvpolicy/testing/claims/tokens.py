"""Claims about single tokens: that they stay, that they leave, and in which order."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpolicy.language.base import Complaint
from kvpolicy.plan import Plan
from kvpolicy.testing.arguments import Numbers, Tokens
from kvpolicy.testing.claims.base import Breach, Claim, check_moment, claim
from kvpolicy.testing.seen import Seen
from kvpolicy.testing.tokens import read_tokens, spelled

Which = Tokens | str
"""Positions, or one of `prompt`, `all`, `window`."""


@claim
@dataclass(kw_only=True)
class Keeps(Claim):
    """Tokens stay from the pass that admits them to the end, or through the moment ``until``.

    ``tokens``: positions, `prompt`, `all` that was admitted, or `window`: at every moment the ``of`` newest admitted.
    """

    MAIN = "tokens"
    tokens: Which
    of: int | None = None
    until: int | None = None

    def check(self, plan: Plan, length: int) -> None:
        super().check(plan, length)
        if (self.tokens == "window") != (self.of is not None):
            raise Complaint("`window` and `of` need each other", "as in `{keeps: window, of: 8}`", ("tokens",))
        if self.of == 0:
            raise Complaint("a window of no tokens", path=("of",))
        if plan.turns > 1 and isinstance(self.tokens, str):
            raise Complaint(f"`{self.tokens}` is not followed over later turns", "name positions", ("tokens",))
        if self.tokens == "prompt" and not plan.prompt[0]:
            raise Complaint("there is no prompt", "the attention's `prompt` says how long it is", ("tokens",))
        first = self.tokens[-1] if isinstance(self.tokens, tuple) else plan.prompt[1] - 1
        check_moment(self.until, "until", first, length)

    def judge(self, seen: Seen) -> Breach | None:
        if self.until is not None and seen.newest > self.until:
            return None
        gone = self._wanted(seen) - seen.kept(self.pool)
        return Breach(f"{spelled(gone)} left{self.inside}", gone) if gone else None

    def _wanted(self, seen: Seen) -> frozenset[int]:
        if isinstance(self.tokens, tuple):
            return frozenset(token for token in self.tokens if token <= seen.newest)
        if self.tokens == "prompt":
            return frozenset(range(seen.step.prompt_len))
        admitted = seen.admitted(self.pool)
        return frozenset(admitted[-self.of :] if self.of else admitted)


@claim
@dataclass(kw_only=True)
class Evicts(Claim):
    """Tokens are gone from the moment ``by`` on (the end of the text unless said)."""

    MAIN = "tokens"
    tokens: Tokens
    by: int | None = None

    def check(self, plan: Plan, length: int) -> None:
        super().check(plan, length)
        check_moment(self.by, "by", self.tokens[-1], length)
        self.moment = length - 1 if self.by is None else self.by

    def judge(self, seen: Seen) -> Breach | None:
        still = seen.kept(self.pool).intersection(self.tokens) if seen.newest >= self.moment else frozenset()
        return Breach(f"{spelled(still)} did not leave{self.inside}", still) if still else None


@claim
@dataclass(kw_only=True)
class Order(Claim):
    """Tokens leave one after the other, as listed, none in one pass with the next; all but the last do leave."""

    MAIN = "tokens"
    tokens: Numbers
    gone: dict[tuple[int, int, int], int] = field(default_factory=dict, init=False)

    def check(self, plan: Plan, length: int) -> None:
        super().check(plan, length)
        if len(set(self.tokens)) < 2 or len(set(self.tokens)) < len(self.tokens):
            raise Complaint("an order needs at least two different tokens", "as in `{order: [40, 20]}`", ("tokens",))
        read_tokens(self.tokens, length)
        self.end = length - 1

    def judge(self, seen: Seen) -> Breach | None:
        kept, before = seen.kept(self.pool), self.gone.get(seen.place, 0)
        left = [token <= seen.newest and token not in kept for token in self.tokens]
        if any(left[before + 1 :]):
            later = zip(self.tokens[before + 1 :], left[before + 1 :], strict=True)
            early = frozenset(token for token, yes in later if yes)
            return Breach(f"{spelled(early)} left{self.inside} before or together with {self.tokens[before]}", early)
        self.gone[seen.place] = before + left[before] if before < len(left) else before
        if seen.newest >= self.end and self.gone[seen.place] < len(left) - 1:
            stayed = self.tokens[self.gone[seen.place]]
            return Breach(f"{stayed} never left{self.inside}", frozenset({stayed}))
        return None
