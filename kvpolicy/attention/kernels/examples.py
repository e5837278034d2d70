"""What each module of kernels says of its launches, so that they can be compiled without a GPU.

A module that defines kernels has a function ``examples() -> Iterator[Example]`` that yields, for every kernel that is
launched, at least one ``Example``: the kernel and a value for each of its arguments, by name. What a kernel calls is
compiled with it and needs none of its own. tests/attention/test_kernels_compile.py finds modules and kernels by walking
this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
SCALARS = {int: "i32", float: "fp32"}


@dataclass(frozen=True)
class Example:
    """One launch of a kernel.

    ``arguments`` gives, for an argument that is a tensor, its dtype (for a tuple of tensors, a tuple); for a number,
    its type (``int`` or ``float``); for a constexpr, its value; and None for a tensor that this launch leaves out.
    """

    kernel: Any  # triton.runtime.jit.JITFunction, or its interpreted twin
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def source(self) -> Any:
        """What ``triton.compile`` takes. Pointers count as aligned to 16 bytes, as torch allocates them."""
        from triton.compiler import ASTSource

        signature: dict[str, str | tuple[str, ...]] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for number, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, tuple):
                signature[parameter.name] = tuple(POINTERS[dtype] for dtype in value)
                attributes.update({(number, n): [["tt.divisibility", 16]] for n in range(len(value))})
            elif isinstance(value, torch.dtype):
                signature[parameter.name] = POINTERS[value]
                attributes[(number,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[parameter.name] = SCALARS[int]
                if value % 16 == 0:
                    attributes[(number,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = SCALARS[value]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
