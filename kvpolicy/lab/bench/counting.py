"""Launches of a step, counted by torch's profiler: kernels on a GPU; on a CPU operators and fused kernels.

On a CPU an operator counts where no other one called it, and where it does more than make a view. Fused kernels of
compiled code show only where ``kernels_visible`` was on when the code was compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

GRAPH = "## Call CompiledFxGraph"


@contextmanager
def kernels_visible() -> Iterator[None]:
    """Have Inductor's C++ kernels tell the profiler of their calls, in code that is compiled from here on."""
    with inductor.patch({"cpp.enable_kernel_profile": True}):
        yield


def launches(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Launches of a step, the mean of some."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as told:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    events: Any = told.events()
    if on_gpu:
        return sum(_on_gpu(event) for event in events) / steps
    return sum(_launched(event) for event in events) / steps


def _on_gpu(event: Any) -> bool:
    """A kernel, a copy or a fill; ranges that Python marked are on the GPU's timeline as well, and do nothing."""
    marked = getattr(event, "is_user_annotation", False) or event.name.startswith(GRAPH)
    return bool(event.device_type == DeviceType.CUDA and not marked)


def _launched(event: Any) -> bool:
    if not _is_operator(event) or _is_view(event.name):
        return False
    above = event.cpu_parent
    while above is not None:
        if _is_operator(above):
            return False
        above = above.cpu_parent
    return True


def _is_operator(event: Any) -> bool:
    parent = event.cpu_parent
    return "::" in event.name or (parent is not None and parent.name.startswith(GRAPH))


def _is_view(name: str) -> bool:
    """Whether an operator only makes a view of its input."""
    space, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, space, None), operator, None)
    return packet is not None and any(getattr(packet, overload).is_view for overload in packet.overloads())


def graphs_compiled() -> tuple[int, int]:
    """What torch.compile did in this process so far: graphs, and graph breaks."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
