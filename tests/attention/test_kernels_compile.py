"""Every kernel compiles for the GPUs it is meant for, and fits them. No GPU is needed: the compiler comes with triton.

The signatures are what each module says of its own launches (kvpolicy/attention/kernels/examples.py). Run this file
with `-s` to see the table: shared memory, registers and spills.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TARGETS = (80, 90)  # A100; H100 and H200
SHARED = {
    80: 163 * 1024,
    90: 227 * 1024,
}  # bytes a block may have: CUDA C++ programming guide, compute capabilities


def compile_kernels(*arguments: object) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.attention.compiling", *map(str, arguments)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return compile_kernels(*TARGETS)


def test_every_kernel_is_compiled_by_an_example(told):
    assert "kvpolicy.attention.kernels.prompt._column_sums" in told[-1]["found"]  # the walk finds what there is
    assert not set(told[-1]["found"]) - set(told[-1]["compiled"])


def test_every_example_compiles_and_fits(told):
    check(told[:-1])


@pytest.mark.slow
def test_every_example_compiles_to_the_end():
    rows = compile_kernels("--all", *TARGETS)[:-1]
    assert not [row for row in rows if "shared" not in row]
    check(rows)


def check(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'kernel':24} {'example':>7} {'target':>6} {'shared':>7} {'registers':>9} {'stack':>6}")
    for row in rows:
        if "shared" in row:
            print("{kernel:24} {number:7} sm_{target:3} {shared:7} {registers:9} {stack:6}".format(**row))
    assert not [row for row in rows if "error" in row]
    assert not [row for row in rows if row.get("shared", 0) > SHARED[row["target"]]]
    assert {row["target"] for row in rows} == set(TARGETS)
