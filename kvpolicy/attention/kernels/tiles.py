"""The types and the sides of the tiles that kernels multiply."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from kvpolicy.attention.kernels.interpreting import allow_loops_over_numbers

allow_loops_over_numbers()

# Products of float32: three of tf32 on tensor cores, to float32's precision but for the last bit or two. The other
# exact way, plain multiplications, spills registers by the kilobyte. Other types know no difference.
PRECISION = tl.constexpr("tf32x3")
DOTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dot_dtype(kernel: Any, tensor: Tensor) -> Any:
    """The type in which a kernel multiplies: the tensor's own; float32 in the interpreter, whose NumPy has no bf16."""
    return tl.float32 if isinstance(kernel, InterpretedFunction) else DOTS[tensor.dtype]


def power_of_2(count: int) -> int:
    """The next power of two, as the side of a tile must be one."""
    return 1 << (count - 1).bit_length()


def tile_side(channels: int, itemsize: int) -> int:
    """How many vectors of ``channels`` numbers a tile holds: 16 KiB of them, 16 at least and 64 at most.

    Two such tiles and what is fetched ahead fit into the shared memory and the registers of every GPU from an A100 on.
    """
    return max(16, min(64, (16 << 10) // (power_of_2(channels) * itemsize)))
