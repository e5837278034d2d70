"""Compile the kernels of kvpolicy/attention/kernels as on a GPU, without one. A line of JSON for each thing learnt.

    python -m tests.attention.compiling 80 90         every launch as far as Triton's own IR, one a kernel to the end
    python -m tests.attention.compiling --all 80 90   every launch to the end; minutes

It finds modules and kernels by walking the package, and their launches by asking each module for its examples. It runs
in a process of its own, without TRITON_INTERPRET, so that no kernel is interpreted.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.knobs import nvidia
from triton.runtime.jit import JITFunction

import kvpolicy.attention.kernels as home

compiled: set[str] = set()  # kernels that were launched or called in what was compiled


def note(function: JITFunction, parse: Any = JITFunction.parse) -> Any:
    compiled.add(f"{function.fn.__module__}.{function.fn.__name__}")
    return parse(function)


def kernels(module: ModuleType) -> Iterator[str]:
    for value in vars(module).values():
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
            yield f"{module.__name__}.{value.fn.__name__}"


def generate(example: Any, target: GPUTarget, options: dict[str, int]) -> None:
    """Triton's own IR of a launch: everything that the kernel calls is found, and its types are checked."""
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    chosen = backend.parse_options(dict(options))
    functions, modules = backend.get_codegen_implementation(chosen), backend.get_module_map()
    example.source().make_ir(target, chosen, functions, modules, context)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: what did not fit into them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        word: int(re.findall(rf"{name}:(\d+)", told)[-1]) for word, name in (("registers", "REG"), ("stack", "STACK"))
    }


def compile_example(example: Any, target: GPUTarget, to_the_end: bool) -> dict[str, Any]:
    options = {"num_warps": example.num_warps, "num_stages": example.num_stages}
    try:
        generate(example, target, options)
        if not to_the_end:
            return {}
        done = triton.compile(example.source(), target=target, options=options)
        return {"shared": done.metadata.shared, **resources(done.asm["cubin"])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(arguments: list[str]) -> None:
    everything = "--all" in arguments
    targets = [int(argument) for argument in arguments if argument != "--all"]
    JITFunction.parse = note
    names = sorted(module.name for module in pkgutil.walk_packages(home.__path__, f"{home.__name__}."))
    modules = [importlib.import_module(name) for name in names]
    found = {name for module in modules for name in kernels(module)}
    compiled.clear()
    begun: set[tuple[str, int]] = set()
    for module in modules:
        for number, example in enumerate(module.examples() if hasattr(module, "examples") else ()):
            row = {"module": module.__name__, "kernel": example.name, "number": number}
            for target in targets:
                first = (f"{module.__name__}.{example.name}", target) not in begun
                begun.add((f"{module.__name__}.{example.name}", target))
                result = compile_example(example, GPUTarget("cuda", target, 32), everything or first)
                print(json.dumps({**row, "target": target, **result}), flush=True)
    print(json.dumps({"found": sorted(found), "compiled": sorted(compiled)}))


if __name__ == "__main__":
    main(sys.argv[1:])
