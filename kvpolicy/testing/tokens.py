"""Positions as tests write them: `40`, `"8..11"` (both included), or a list of these."""

from __future__ import annotations

import re
from typing import Any

from kvpolicy.language.base import Complaint
from kvpolicy.language.nodes import shown

RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
SPELLING = "a position is a number from 0, `8..11` (both included), or a list of these"


def read_tokens(value: Any, length: int) -> tuple[int, ...]:
    """Positions, ascending, of a text of ``length`` tokens. Raises Complaint."""
    found = _tokens(value)
    if not found:
        raise Complaint("no position is named", SPELLING)
    if found[-1] >= length:
        raise Complaint(f"position {found[-1]} is never said", f"the text's positions are 0..{length - 1}")
    return tuple(found)


def _tokens(value: Any) -> list[int]:
    if isinstance(value, list | tuple):
        return sorted({token for item in value for token in _tokens(item)})
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return [value]
    match = RANGE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise Complaint(f"`{shown(value)}` is no position", SPELLING)
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise Complaint(f"the range {first}..{last} is empty", f"write `{last}..{first}`")
    if last - first > 10**6:
        raise Complaint(f"the range {first}..{last} is too long")
    return list(range(first, last + 1))


def whole(value: Any, least: int = 0) -> int:
    """A whole number of at least ``least``. Raises Complaint."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise Complaint(f"`{shown(value)}` is not a whole number from {least}")
    return value


def numbers(value: Any, least: int = 0) -> tuple[int, ...]:
    """One whole number or a list of them. Raises Complaint."""
    return tuple(whole(item, least) for item in (value if isinstance(value, list | tuple) else [value]))


def spelled(tokens: frozenset[int] | set[int] | tuple[int, ...] | list[int]) -> str:
    """Positions for a reader, neighbours joined: `0..3, 7, 12..15`."""
    runs: list[list[int]] = []
    for token in sorted(tokens):
        if runs and token == runs[-1][1] + 1:
            runs[-1][1] = token
        else:
            runs.append([token, token])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) or "none"
