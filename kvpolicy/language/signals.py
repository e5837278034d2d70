"""Names of signals, what each means and may be told. What they compute is in kvpolicy/oracle and kvpolicy/scorers.

Plug-ins add signals through the entry-point group `kvpolicy.scorers`: each entry leads to a `SignalDefinition`, which
is loaded when a policy first names it, and names its two recipes, which are loaded when they are first run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kvpolicy.errors import UsageError
from kvpolicy.language.quantity import Quantity

ENTRY_POINTS = "kvpolicy.scorers"

NEEDS = {
    "logits": "scaled q.k of the queries that score, before any softmax (attention takes its softmax from them)",
    "bounds": "the channel-wise extremes of each page's keys",
    "drawn": "a number drawn when the unit enters",
    "keys": "the stored keys",
    "values": "the stored values",
}
"""What a signal may read."""


@dataclass(frozen=True)
class SignalArgument:
    """An argument of a signal: a number known when the plan is made, `least` or more, or one of `words`."""

    meaning: str
    default: Quantity | str | float
    words: tuple[str, ...] = ()
    least: Fraction | None = None

    def __post_init__(self) -> None:
        if self.words:
            if self.default not in self.words:
                raise ValueError(f"the default `{self.default}` is none of the words {', '.join(self.words)}")
        elif not isinstance(self.default, Quantity):
            object.__setattr__(self, "default", Quantity.parse(str(self.default)))


@dataclass(frozen=True)
class SignalDefinition:
    """What there is to know of a signal without computing it; its name is that of its entry point.

    Args:
        meaning: one line, higher being better.
        queries: whether it looks at queries, so that `queries` and `heads` say something.
        softmax: whether it is a softmax, so that `over` and `heads: {logits: max}` say something.
        needs: what it reads, of ``NEEDS``.
        arguments: by name, as a policy writes them.
        units: whether the NumPy recipe scores units (pages) rather than tokens.
        numpy: the recipe that the oracle runs (``kvpolicy.oracle.signals.TokenSignal`` or, with ``units``,
            ``UnitSignal``), as a function or as ``module:function``.
        torch: the recipe that the runtime runs (``kvpolicy.scorers.registry.SignalFunction``), as ``module:function``,
            so that nothing imports torch before it runs. Without it, only the oracle can run the signal.

    The built-in ones have their recipes in kvpolicy/oracle/signals.py and kvpolicy/scorers.
    """

    meaning: str
    queries: bool = False
    arguments: Mapping[str, SignalArgument] = field(default_factory=dict)
    softmax: bool = False
    needs: Collection[str] = ()
    units: bool = False
    numpy: Callable[..., Any] | str | None = None
    torch: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted({*self.needs} - NEEDS.keys())
        if unknown:
            raise ValueError(f"needs {', '.join(map(repr, unknown))}; known are {', '.join(NEEDS)}")


SIGNALS: dict[str, SignalDefinition] = {
    "attention": SignalDefinition(
        "softmax of the scaled logits: how much the queries attend to a token",
        queries=True,
        softmax=True,
        needs={"logits"},
    ),
    "gumbel-attention": SignalDefinition(
        "attention with Gumbel noise on the logits, drawn once for each token, and a temperature that grows with `t`",
        queries=True,
        softmax=True,
        needs={"logits"},
        arguments={
            "temperature": SignalArgument("what the logits are divided by at t = 0", 1, least=Fraction(1, 100)),
            "growth": SignalArgument("what each generated token adds to the temperature", 0.01, least=Fraction(0)),
            "seed": SignalArgument("a whole number", 0),
        },
    ),
    "above-average": SignalDefinition(
        "1 where a query pays a token at least its share, 1 / the number of tokens it sees; else 0",
        queries=True,
        softmax=True,
        needs={"logits"},
    ),
    "attention-logit": SignalDefinition("the scaled logits themselves", queries=True, needs={"logits"}),
    "page-bound": SignalDefinition(
        "the most that any key inside the page's channel-wise box could score", queries=True, needs={"bounds"}
    ),
    "recency": SignalDefinition("the position of the unit's newest token"),
    "random": SignalDefinition(
        "a hash of seed, layer, head and position, drawn at entry",
        arguments={"seed": SignalArgument("a whole number", 0)},
        needs={"drawn"},
    ),
    "key-norm": SignalDefinition("the length of the key; a negative weight keeps short keys", needs={"keys"}),
    "value-norm": SignalDefinition("the length of the value", needs={"values"}),
    "key-anchor": SignalDefinition("cosine of the key with the mean direction of the pool's keys", needs={"keys"}),
    "key-similarity": SignalDefinition(
        "how redundant the key is: its mean cosine with the others of its pool; a negative weight keeps what is not",
        arguments={
            "above": SignalArgument("keys with a greater cosine are copies of one another", 0.5),
            "keep": SignalArgument("which copy of a key counts nothing towards its redundancy", "newest", ("newest",)),
        },
        needs={"keys"},
    ),
    "lag": SignalDefinition(
        "how uneven key and value are against the ranges of the next block of the text, as a rank within their own; "
        "without a whole next block, 1",
        arguments={
            "lag": SignalArgument("positions in a block", 128, least=Fraction(1)),
            "after": SignalArgument("the position where the first block begins", 0, least=Fraction(0)),
        },
        needs={"keys", "values"},
    ),
}


@cache
def plugin_entries() -> Mapping[str, tuple[EntryPoint, ...]]:
    """Name -> the entry points that claim it, of signals that installed packages add; nothing is loaded."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        if entry not in found.get(entry.name, ()):
            found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def signal_names() -> list[str]:
    """Every signal that may be named: the built-in ones, which win on a clash, then those of plug-ins."""
    return [*SIGNALS, *sorted(plugin_entries().keys() - SIGNALS.keys())]


def origin(name: str) -> str:
    """Who adds a signal: `kvpolicy`, or the packages of a plug-in."""
    return "kvpolicy" if name in SIGNALS else _packages(name)


def clash(name: str) -> str:
    """A sentence where a package claims the name of a built-in signal."""
    if name not in SIGNALS or name not in plugin_entries():
        return ""
    return f"{_packages(name)} claims the name `{name}` too, in vain: it is kvpolicy's own"


def definition(name: str) -> SignalDefinition:
    """A signal by its name; that of a plug-in is loaded.

    Raises:
        KeyError: there is none.
        UsageError: two packages claim the name, or the one that does is broken.
    """
    return SIGNALS[name] if name in SIGNALS else _plugged_in(name)


@cache
def _plugged_in(name: str) -> SignalDefinition:
    entries = plugin_entries()[name]
    if len(entries) > 1:
        raise UsageError(f"the signal `{name}` is claimed by {origin(name)}; uninstall one of them")
    found = loaded(entries[0], f"the signal `{name}` of {origin(name)}")
    if not isinstance(found, SignalDefinition):
        kind = type(found).__name__
        raise UsageError(f"the signal `{name}` of {origin(name)} must be a kvpolicy.SignalDefinition, not a {kind}")
    if "drawn" in found.needs:
        raise UsageError(f"the signal `{name}` of {origin(name)} needs `drawn`, which is for `random` alone")
    return found


def recipe(name: str, half: str) -> Callable[..., Any] | None:
    """The NumPy or the torch recipe of a plug-in's signal, loaded; None where it has none.

    Args:
        half: "numpy" or "torch".

    Raises:
        UsageError: it cannot be loaded, or is no function.
    """
    told = getattr(definition(name), half)
    what = f"the {'NumPy' if half == 'numpy' else half} recipe of the signal `{name}` of {origin(name)}"
    function = loaded(EntryPoint(name, told, ENTRY_POINTS), what) if isinstance(told, str) else told
    if function is not None and not callable(function):
        raise UsageError(f"{what} is a {type(function).__name__}, and no function")
    return function


def loaded(entry: EntryPoint, what: str) -> Any:
    """What an entry point leads to; whatever a plug-in's code does wrong is the user's to mend."""
    try:
        return entry.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{what} cannot be loaded from {entry.value}: {reason}; mend or uninstall it") from error


def _packages(name: str) -> str:
    return " and ".join(map(_package, plugin_entries()[name]))


def _package(entry: EntryPoint) -> str:
    made = entry.dist
    return f"the package {made.name} {made.version}" if made is not None else "an unnamed package"
