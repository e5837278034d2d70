"""Refuse whatever would make the host wait for the device: how a step is held to asking it nothing.

torch itself marks the operations whose result, or its shape, depends on the numbers in a tensor; a few ways of reading
a tensor from Python never reach the dispatcher and are caught before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__")
}
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class HostWaited(RuntimeError):
    """Something asked the device for a number where nothing may."""


class _Reads(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS or (func is Tensor.to and "cpu" in args):
            raise HostWaited(f"Tensor.{func.__name__} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _depends_on_numbers(func, args):
            raise HostWaited(f"{func} gives what only the device knows")
        devices = {each.device.type for each in args if isinstance(each, Tensor) and each.ndim}
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if func in COPIES and len(devices) > 1:
            raise HostWaited("a copy between the host and a device")
        return func(*args, **(kwargs or {}))


def _depends_on_numbers(func: Any, args: Any) -> bool:
    if func._schema.name.startswith("aten::index") and func._schema.arguments[1].name == "indices":
        # By place its result is as long as the index; by a mask, which is turned into places first, who knows.
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return not TAGS.isdisjoint(func.tags)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, reading a tensor on the host raises HostWaited, whatever device it is on."""
    with _Reads(), _Operations():
        yield


def waits(work: Callable[[], Any]) -> bool:
    """Whether running ``work`` reads a tensor on the host."""
    try:
        with no_waiting():
            work()
    except HostWaited:
        return True
    return False
