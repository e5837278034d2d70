"""What a token is worth: one file per signal and per family of memories.

Each file states its recipe and where it comes from. Shapes: B rows, K KV heads, G query heads of a KV head, S slots,
U units of a pool, D head size.
"""

import importlib
import pkgutil

from kvpolicy.scorers.registry import SIGNALS, find, signal

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SIGNALS", "find", "signal"]
