"""Signals by name. A signal is one file here, a function and a decorator; or a plug-in's torch recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from kvpolicy.errors import UsageError
from kvpolicy.language.signals import origin, recipe

if TYPE_CHECKING:
    from kvpolicy.plan import PoolPlan
    from kvpolicy.scorers.sight import Leaf, Sight

# What a signal says of the units of one pool: float32 [B, K, U], higher is better.
SignalFunction = Callable[["Sight", "PoolPlan", "Leaf"], Tensor]

SIGNALS: dict[str, SignalFunction] = {}


def signal(name: str) -> Callable[[SignalFunction], SignalFunction]:
    """Register a signal under the name that policies use."""

    def register(function: SignalFunction) -> SignalFunction:
        if name in SIGNALS:
            raise ValueError(f"signal {name} is defined twice: {SIGNALS[name].__module__}, {function.__module__}")
        SIGNALS[name] = function
        return function

    return register


def find(name: str) -> None:
    """Make sure that a signal is known here: the recipe of a plug-in is loaded, and its results are checked.

    Raises:
        UsageError: it cannot be loaded, or there is none.
    """
    if name in SIGNALS:
        return
    function = recipe(name, "torch")
    if function is None:
        raise UsageError(f"{origin(name)} gives the signal `{name}` no torch recipe, so only the oracle can run it")

    def checked(sight: Sight, pool: PoolPlan, leaf: Leaf) -> Tensor:
        score: Tensor = function(sight, pool, leaf)
        units = (*sight.state.position.shape[:2], pool.units)
        if tuple(score.shape) != units:
            raise UsageError(
                f"the torch recipe of the signal `{name}` of {origin(name)} gives {tuple(score.shape)}, and a number "
                f"for each unit is wanted, [rows, KV heads, units] {units}"
            )
        return score.float()

    SIGNALS[name] = checked
