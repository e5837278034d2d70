"""Names of signals, and what each may be told; the signals themselves live in kvpolicy/scorers.

Plug-ins add names through the entry-point group `kvpolicy.scorers`. Only their names are read here: nothing is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points

from kvpolicy.language.quantity import Quantity

ENTRY_POINTS = "kvpolicy.scorers"


@dataclass(frozen=True)
class Argument:
    """An argument of a signal: a number known when the plan is made, or one of `words`."""

    meaning: str
    default: Quantity | str
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class SignalName:
    """A built-in signal: its meaning, its arguments, and whether it looks at queries at all."""

    meaning: str
    queries: bool = False
    arguments: dict[str, Argument] = field(default_factory=dict)


SIGNALS: dict[str, SignalName] = {
    "attention": SignalName("softmax of the scaled logits: how much the queries attend to a token", queries=True),
    "attention-logit": SignalName("the scaled logits themselves", queries=True),
    "page-bound": SignalName("the most that any key inside the page's channel-wise box could score", queries=True),
    "recency": SignalName("the position of the unit's newest token"),
    "random": SignalName(
        "a hash of seed, layer, head and position, drawn at entry",
        arguments={"seed": Argument("a whole number", Quantity.number(0))},
    ),
    "key-norm": SignalName("the length of the key; a negative weight keeps short keys"),
    "value-norm": SignalName("the length of the value"),
    "key-anchor": SignalName("cosine of the key with the mean direction of the pool's keys"),
    "key-similarity": SignalName(
        "how redundant the key is: its mean cosine with the others of its pool; a negative weight keeps what is not",
        arguments={
            "above": Argument("cosines up to this count as 0", Quantity.parse("0.5")),
            "keep": Argument("which of several similar keys is not counted as redundant", "newest", ("newest",)),
        },
    ),
}


@cache
def plugin_signals() -> frozenset[str]:
    """Names of signals that installed packages add."""
    return frozenset(entry.name for entry in entry_points(group=ENTRY_POINTS)) - SIGNALS.keys()


def signal_names() -> frozenset[str]:
    """Every signal that may be named: the built-in ones, which win on a clash, and those of plug-ins."""
    return plugin_signals() | SIGNALS.keys()
