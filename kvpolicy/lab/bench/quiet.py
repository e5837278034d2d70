"""Keeps torch's profiler, off which memory and launches are read, from speaking to stderr."""

from __future__ import annotations

import os


def quiet_profiler() -> None:
    """Its C++ half speaks unless it is told not to; to be called before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
