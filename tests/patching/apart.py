"""Devices that are not there: every tensor is told where it lies, and what mixes two places raises as a GPU would.

All numbers are computed on the CPU. A tensor's place is an attribute of it, handed on from what goes into an operation
to what comes out; a scalar may come from anywhere, and `copy_` and `to` go from one place to another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

FIRST, SECOND = torch.device("xpu:0"), torch.device("xpu:1")
HOME = torch.device("cpu")


class Mixed(RuntimeError):
    """An operation met tensors of two devices."""


def place_of(tensor: Tensor) -> torch.device:
    return tensor.__dict__.get("place", HOME)


def put(module: nn.Module, device: torch.device) -> None:
    """Say of everything that a module holds where it lies."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.__dict__["place"] = device


class Apart(TorchFunctionMode):
    """Inside, tensors lie where they are said to. ``met`` are the places that any operation ran in."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[torch.device] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return place_of(args[0])
        if func is Tensor.to or func is Tensor.cpu:
            return self._moved(func, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = HOME
        places = {place_of(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.ndim}
        if func is Tensor.copy_ or func is Tensor.__setitem__:
            places = {place_of(args[0])} | (places if func is Tensor.__setitem__ else set())
        if len(places) > 1 and getattr(func, "__name__", "") != "__get__":
            raise Mixed(f"{getattr(func, '__name__', func)} of tensors on {', '.join(sorted(map(str, places)))}")
        self.met |= places
        place = torch.device(asked) if asked is not None else next(iter(places), HOME)
        return _tagged(func(*args, **kwargs), place)

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        place = HOME if func is Tensor.cpu else place_of(args[0])
        rest = []
        for each in args[1:]:
            if isinstance(each, torch.device) or (isinstance(each, str) and not hasattr(torch, each)):
                place = torch.device(each)
            elif isinstance(each, Tensor):
                place = place_of(each)
                rest.append(each)
            else:
                rest.append(each)
        if kwargs.get("device") is not None:
            place = torch.device(kwargs.pop("device"))
        moved = func(args[0], *rest, **kwargs) if rest or kwargs else args[0]
        if moved is args[0] and place != place_of(args[0]):
            moved = args[0].clone()
        return _tagged(moved, place)


def _tagged(result: Any, place: torch.device) -> Any:
    for each in tree_leaves(result):
        if isinstance(each, Tensor) and "place" not in each.__dict__:
            each.__dict__["place"] = place
    return result
