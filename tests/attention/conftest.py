"""Kernels where they can run: on an NVIDIA GPU for real, elsewhere line by line in Triton's interpreter.

A test that asks for `device` tests kernels. On a machine with CUDA it gets `cuda` and the marker `gpu`, so that
`pytest -m gpu` runs exactly these; on any other machine it gets `cpu`, and the kernels are interpreted. A test that is
marked `gpu` in its own file cannot be interpreted, and is skipped where there is no GPU (tests/conftest.py).
"""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and not CUDA


def interpret() -> None:
    """Make every kernel of this process an interpreted one, and leave the environment as it was.

    Triton reads TRITON_INTERPRET when a kernel is defined. Other test files share this process and may have imported
    triton before (torch does, transformers does), so what is already defined is replaced as well: triton's own library
    (`tl.sum` is a kernel too) and ours.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language

        import kvpolicy.attention.kernels as ours

        for module in pkgutil.walk_packages(ours.__path__, f"{ours.__name__}."):
            importlib.import_module(module.name)
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        for name, module in list(sys.modules.items()):
            if name.startswith((triton.language.__name__, ours.__name__)):
                for attribute, value in list(vars(module).items()):
                    if isinstance(value, JITFunction):
                        setattr(module, attribute, InterpretedFunction(value.fn))


if INTERPRETED:
    interpret()


class WithoutTriton(pytest.Module):
    """A file of this folder where there is no triton: it imports kernels at its top, so it is not imported."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip("triton is not installed; it comes with kvpolicy[test] on Linux", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if HAS_TRITON else WithoutTriton.from_parent(parent, path=module_path)


def pytest_itemcollected(item: pytest.Item) -> None:
    if CUDA and "device" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a test of this folder runs, the environment says what `available` asks it."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")
