"""Triton kernels over the slot buffer. Nothing outside this package imports triton, and only its use imports this.

Each module of kernels has a function ``examples``, described in ``kernels/examples.py``: the signatures under which its
kernels are compiled ahead of time, on any machine, to show that they compile.
"""

from __future__ import annotations

import importlib.util
import os

import torch


def available(device: torch.device | str) -> str | None:
    """Why kernels cannot run on ``device``, in one clause; None where they can.

    On a CPU they run in Triton's interpreter alone, and TRITON_INTERPRET=1 must be set before triton is imported.
    """
    kind = torch.device(device).type
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if kind == "cuda":
        return None
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if kind == "cpu":
        return "a CPU runs triton's kernels in its interpreter alone (TRITON_INTERPRET=1 in the environment)"
    return f"no kernel was written for a device of type {kind}"
