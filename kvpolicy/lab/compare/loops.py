"""Outputs that go round in circles: their end is one stretch of words, said over and over."""

from __future__ import annotations

from collections.abc import Sequence

TURNS = 4
"""How often a stretch must be said at the end."""

LEAST = 16
"""Words that must be spent on it, at the least: a short word is said four times for good reasons."""


def loop(words: Sequence[str], *, allowed: int = 0) -> int:
    """The length of the shortest stretch that the end of an output repeats; 0 where it repeats none.

    Args:
        allowed: a stretch of this length, or of several of it, is what was asked for; 0: none is.
    """
    for period in range(1, len(words) // TURNS + 1):
        span = max(TURNS * period, LEAST)
        if span > len(words):
            break
        end = words[-span:]
        if all(word == end[place - period] for place, word in enumerate(end) if place >= period):
            return 0 if allowed and period % allowed == 0 else period
    return 0
