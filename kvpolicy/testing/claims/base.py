"""What all claims share, and the list of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvpolicy.language.base import Complaint
from kvpolicy.language.nodes import shown
from kvpolicy.language.vocabulary import nearest
from kvpolicy.plan import Plan
from kvpolicy.testing.arguments import Numbers
from kvpolicy.testing.seen import Seen

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


def check_moment(moment: int | None, name: str, first: int, length: int) -> None:
    """A moment lies in the text, and not before the tokens it is about were said."""
    if moment is not None and moment >= length:
        raise Complaint(f"position {moment} is never said", f"the text's positions are 0..{length - 1}", (name,))
    if moment is not None and moment < first:
        raise Complaint(f"at {moment}, position {first} has not been said", f"`{name}` is later", (name,))
