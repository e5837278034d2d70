"""The claims of a ``tests:`` block: what a policy must keep, drop and hold, judged after every pass of every KV head.

Numbers are positions. A moment is named by the newest token then: `until: 90` and `by: 90` both mean the pass that
admits the token at position 90, its update included; the whole prompt is one moment, that of its last token. A claim
holds in every layer, KV head and row; `layer`, `head` and `row` (a number or a list) narrow it down, `pool` to one
pool. A claim is written `{keeps: 40, until: 90}` or, with more to say, `{keeps: {tokens: 40, until: 90, layer: 0}}`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from kvpolicy.language import Quantity
from kvpolicy.language.base import Complaint
from kvpolicy.language.nodes import shown
from kvpolicy.language.vocabulary import nearest
from kvpolicy.plan import Plan
from kvpolicy.testing.arguments import Numbers, Tokens
from kvpolicy.testing.seen import Seen
from kvpolicy.testing.tokens import read_tokens, spelled

Which = Tokens | str
"""Positions, or one of `prompt`, `all`, `window`."""

Moments = tuple[int, ...]
"""Positions of tokens that are the newest then; possibly none."""


@dataclass(frozen=True)
class Breach:
    """A claim that does not hold: why, and the tokens concerned."""

    reason: str
    tokens: frozenset[int] = frozenset()


@dataclass(kw_only=True)
class Claim:
    """What all claims share."""

    MAIN: ClassVar[str]
    """The argument that is written beside the claim's name."""

    pool: str | None = None
    layer: Numbers = ()
    head: Numbers = ()
    row: Numbers = ()

    def check(self, plan: Plan, length: int) -> None:
        """Raise Complaint where the claim can say nothing of a text of ``length`` tokens."""
        shape = plan.geometry
        for name, most in (("layer", shape.layers), ("head", shape.kv_heads), ("row", plan.batch)):
            if any(number >= most for number in getattr(self, name)):
                raise Complaint(f"there is no such {name}: the last is {most - 1}", path=(name,))
        pools = [pool.name for layer in plan.layers for pool in layer.pools]
        if self.pool is not None and self.pool not in pools:
            raise Complaint(f"no pool is called `{shown(self.pool)}`", nearest(self.pool, pools), ("pool",))

    def about(self, seen: Seen) -> bool:
        """Whether it is made of this layer, row and KV head."""
        places = zip((self.layer, self.row, self.head), seen.place, strict=True)
        return all(not asked or at in asked for asked, at in places)

    def judge(self, seen: Seen) -> Breach | None:
        """What is wrong after this pass, if anything; passes come in order."""
        raise NotImplementedError

    @property
    def inside(self) -> str:
        return "" if self.pool is None else f" in pool {self.pool}"


CLAIMS: dict[str, type[Claim]] = {}
"""Name in YAML -> class, whose fields are the claim's arguments."""


def claim(kind: type[Claim]) -> type[Claim]:
    """Make a claim known."""
    CLAIMS[kind.__name__.lower()] = kind
    return kind


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
        return self.count(seen.attended(self.pool), seen, "attended") if seen.step.kind == "generated" else None


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


def check_moment(moment: int | None, name: str, first: int, length: int) -> None:
    """A moment lies in the text, and not before the tokens it is about were said."""
    if moment is not None and moment >= length:
        raise Complaint(f"position {moment} is never said", f"the text's positions are 0..{length - 1}", (name,))
    if moment is not None and moment < first:
        raise Complaint(f"at {moment}, position {first} has not been said", f"`{name}` is later", (name,))
