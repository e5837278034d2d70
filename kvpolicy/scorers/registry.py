"""Signals by name. A signal is one file here (or in a plug-in): a function and a decorator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

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
