"""The classes of tokens, and the thresholds that tell them apart; docs/analyze.md gives the reasons.

A token is *new* to the ``local`` queries from its own on. A later query *looks* at it where it pays it at least
``least`` of its attention, and at least ``times`` what a token of the *middle* gets on average: those that are neither
new nor among the ``first`` of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from kvpolicy.errors import UsageError


class Kind(IntEnum):
    """The class of a token in one head. Listed in the order in which they are tried, but for the last three."""

    SINK = 0
    """One of the ``first`` tokens, at which ``mostly`` all queries look."""
    PHOENIX = 1
    """Looked at after ``silence`` queries or more, in a row, did not."""
    HEAVY_HITTER = 2
    """Elsewhere in the text, looked at by ``mostly`` all queries, the last ones among them."""
    MILESTONE = 3
    """Looked at beyond its first ``local`` queries, with no long silence; most are never looked at again after that."""
    LOCAL = 4
    """Never looked at later, but those to whom it was new paid it ``new`` of a query's attention, all together."""
    LAZY = 5
    """Never looked at, and not paid while it was new."""
    UNJUDGED = 6
    """Too late in the text to tell: fewer than ``silence`` queries could have looked at it."""

    @property
    def word(self) -> str:
        """What it is called: `heavy-hitter`."""
        return self.name.lower().replace("_", "-")


JUDGED = (Kind.SINK, Kind.LOCAL, Kind.HEAVY_HITTER, Kind.MILESTONE, Kind.PHOENIX, Kind.LAZY)
"""In the order in which tables and pictures show them."""


@dataclass(frozen=True)
class Rules:
    """The thresholds. ``local`` and ``silence`` count queries, ``first`` tokens; ``quiet`` is about heads, see
    ``summary.py``; the others are explained where they are used, in this file.

    Raises:
        UsageError: thresholds that make no sense.
    """

    local: int = 32
    silence: int = 64
    first: int = 8
    times: float = 8.0
    least: float = 0.01
    mostly: float = 0.5
    new: float = 0.25
    quiet: float = 0.9

    def __post_init__(self) -> None:
        if min(self.local, self.silence) < 1 or self.first < 0:
            raise UsageError(
                f"a window of {self.local} and a silence of {self.silence} queries: both are 1 or more, as in 32 and 64"
            )
        if self.times < 1 or not all(0 < share <= 1 for share in (self.least, self.mostly, self.new, self.quiet)):
            raise UsageError(
                "`times` is at least 1, and `least`, `mostly`, `new` and `quiet` are shares above 0 up to 1"
            )

    @property
    def begin(self) -> int:
        """The first query that is read: before it the middle is too small for one of its tokens to stand out."""
        return self.first + self.local + int(8 * self.times)

    @property
    def shortest(self) -> int:
        """Tokens of a text in which the class of any token can be told."""
        return self.begin + self.silence + 1
