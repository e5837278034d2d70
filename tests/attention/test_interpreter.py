"""The folder's own ground: kernels run here, and the rest of the process does not notice."""

import os

import pytest
import torch
import triton
import triton.language as tl

from kvpolicy.attention.kernels import available


def test_a_kernel_runs(device):
    @triton.jit  # here and not above: what triton is told while a test of this folder runs, it is not told before
    def row_sums(numbers, sums, columns, BLOCK: tl.constexpr):
        row = tl.program_id(0)
        at = tl.arange(0, BLOCK)
        tl.store(sums + row, tl.sum(tl.load(numbers + row * columns + at, at < columns, 0.0)))

    numbers = torch.arange(12.0, device=device).view(3, 4)[:, :3].contiguous()
    sums = torch.empty(3, device=device)
    row_sums[(3,)](numbers, sums, 3, BLOCK=4)
    assert sums.tolist() == [3.0, 15.0, 27.0]
    assert available(device) is None


def test_why_a_device_cannot_run_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in available("cpu")
    assert "type meta" in available("meta")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert available("cuda") == "triton is not installed"


@pytest.fixture(scope="module")
def environment_between_tests():
    return os.environ.get("TRITON_INTERPRET")


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the caller's environment already asks for it")
def test_other_files_see_no_interpreter(environment_between_tests):
    """A fixture of the module is made before those of a test, as other files' tests run: the variable is not there."""
    assert environment_between_tests is None
