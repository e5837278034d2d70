"""Whether a module is what it was: a check of some ten microseconds, where torch's guards take ten times that.

A compiled decoder layer is called once per layer and step, and each call evaluates several hundred guards, almost all
of them about the layer's modules. Where nothing that a module holds has changed since they last held, they hold again.
"""

from __future__ import annotations

from collections.abc import Hashable
from operator import is_ as _is
from typing import Any

from torch import Tensor, nn


class Unchanged:
    """A snapshot of everything that a module and the modules inside it hold, by identity.

    Attributes, parameters, buffers, submodules and hooks: whatever is replaced, added or taken away shows, also in a
    list or a set (an adapter notes there what it has merged). A tensor that was cast or moved in place shows by its
    dtype and device. A false alarm costs one evaluation of the guards.
    """

    def __init__(self, module: nn.Module) -> None:
        holders: list[dict[Any, Any]] = []
        self._lists: list[tuple[Any, list[Any]]] = []
        for part in module.modules():
            holders.append(vars(part))
            holders += [value for value in vars(part).values() if isinstance(value, dict)]
            self._lists += [(value, list(value)) for value in vars(part).values() if isinstance(value, list | set)]
        self._holders = holders
        self._sizes = [len(holder) for holder in holders]
        self._filled = [(holder, list(holder.values())) for holder in holders if holder]
        tensors = {id(value): value for _, values in self._filled for value in values if isinstance(value, Tensor)}
        self._tensors = [(tensor, tensor.dtype, tensor.device) for tensor in tensors.values()]

    def still(self) -> bool:
        """Whether nothing has changed since the snapshot."""
        if list(map(len, self._holders)) != self._sizes:
            return False
        for holder, values in self._filled:
            if not all(map(_is, holder.values(), values)):
                return False
        for held, before in self._lists:
            if len(held) != len(before) or not all(map(_is, held, before)):
                return False
        for tensor, dtype, device in self._tensors:
            if tensor.dtype is not dtype or tensor.device != device:
                return False
        return True


def made_of(module: nn.Module) -> Hashable:
    """What a module is made of, as far as its owner may lawfully change it between two steps: the types of the modules
    inside it and of their weights, which of them are frozen, and which adapters (peft's) are there, active, merged or
    switched off."""
    return tuple(
        (name, type(part), *map(_weight, part._parameters.values()), *_adapters(part))
        for name, part in module.named_modules()
    )


def _weight(weight: Tensor | None) -> Hashable:
    return type(weight), weight is not None and weight.requires_grad


def _adapters(part: nn.Module) -> tuple[Hashable, ...]:
    if not hasattr(part, "merged_adapters"):
        return ()
    return tuple(part.active_adapters), tuple(part.merged_adapters), bool(part.disable_adapters)
