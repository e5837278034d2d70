"""Memory: how much there is, and how much a piece of work took of it, as the allocator tells.

On CUDA the allocator's own counters are read. On a CPU torch's profiler reports every allocation and release, those of
compiled code too: their running sum is what is allocated, its maximum the peak. Nothing is sampled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Usage:
    """Bytes more than before: ``kept`` at the end, ``peak`` at most. ``reserved``: all that CUDA's allocator holds."""

    kept: int = 0
    peak: int = 0
    reserved: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Usage]:
    """Measure what the block allocates; the usage is filled in when the block ends."""
    usage = Usage()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield usage
        torch.cuda.synchronize(device)
        usage.kept = torch.cuda.memory_allocated(device) - before
        usage.peak = torch.cuda.max_memory_allocated(device) - before
        usage.reserved = torch.cuda.max_memory_reserved(device)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        yield usage
    kineto = told.profiler.kineto_results if told.profiler is not None else None
    events = [] if kineto is None else [event for event in kineto.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        usage.kept += event.nbytes()
        usage.peak = max(usage.peak, usage.kept)


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            told = dict(line.split(":", 1) for line in file)
        return int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def total(device: torch.device) -> int:
    """Bytes that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gigabytes(count: float) -> str:
    """Bytes for people: `12.3 GB`, `456 MB` (10^9 and 10^6)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
