"""The types and the sides of the tiles that kernels multiply."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

DOTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dot_dtype(kernel: Any, tensor: Tensor) -> Any:
    """The type in which a kernel multiplies: the tensor's own; float32 in the interpreter, whose NumPy has no bf16."""
    return tl.float32 if isinstance(kernel, InterpretedFunction) else DOTS[tensor.dtype]


def power_of_2(count: int) -> int:
    """The next power of two, as the side of a tile must be one."""
    return 1 << (count - 1).bit_length()
