"""Colours of pictures, close to Okabe and Ito's set, which most colour-blind readers can tell apart.

They differ in lightness as well: the pools from each other, and what is safe (dark) from what is ranked (light).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvpolicy.lab.simulation import Simulation


class Shade(NamedTuple):
    """A pool's two colours, as #rrggbb."""

    safe: str
    ranked: str


SHADES = (
    Shade("#0072b2", "#8cc4e6"),
    Shade("#b36b00", "#f2bd4b"),
    Shade("#00654a", "#5fc9a8"),
    Shade("#8f3f6d", "#e3aecb"),
)
"""By pool; a fifth pool begins anew."""

CLASSES = {
    "sink": "#5c5c5c",
    "window": "#8cc4e6",
    "local": "#8cc4e6",
    "heavy-hitter": "#0072b2",
    "milestone": "#f2bd4b",
    "phoenix": "#8f3f6d",
    "rest": "#dcdcdc",
    "lazy": "#dcdcdc",
}
"""Of tokens, and of where attention goes; what is alike in both has one colour."""

GONE, MISSED, PAPER, INK, LINE = "#dcdcdc", "#000000", "#ffffff", "#1a1a1a", "#c4c4c4"
"""On white; ``page.css`` has these and their dark counterparts."""


def pool_names(simulations: Sequence[Simulation]) -> list[str]:
    """By pool number, and so by colour, what the pools of these policies are called: `prompt or all`."""
    names: dict[int, list[str]] = {}
    for simulation in simulations:
        for number, name in enumerate(simulation.shown.pools):
            known = names.setdefault(number, [])
            known += [name] if name not in known else []
    return [" or ".join(known) for known in names.values()]


def shade(pool: int) -> Shade:
    """The colours of pool number ``pool``."""
    return SHADES[pool % len(SHADES)]
