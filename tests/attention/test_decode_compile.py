"""The fused step under compilers: torch's, which must not copy the cache, and Triton's, for GPUs that are not here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from kvpolicy.attention import Formula
from kvpolicy.attention.kernels.ops import decode_step
from kvpolicy.plan import ModelGeometry, make_plan
from kvpolicy.runtime import PolicyCache
from kvpolicy.testing.beside import run_layer
from tests.invariants.policies import tight

GEOMETRY = ModelGeometry("random", layers=1, query_heads=2, kv_heads=1, head_dim=16)


def open_cache(name: str, device: torch.device) -> tuple[PolicyCache, Any]:
    """A cache that has read a prompt, and what its next passes are fed."""
    plan = make_plan(tight(name), GEOMETRY, batch=2, prompt=(20, 20), max_new_tokens=40)
    cache = PolicyCache(plan, device=device, backend="triton")
    generator = torch.Generator().manual_seed(3)

    def draw(columns: int) -> list[torch.Tensor]:
        return [torch.randn(2, heads, columns, 16, generator=generator).to(device) for heads in (2, 1, 1)]

    cache.begin(20)
    cache.layers[0].forward(*draw(20), Formula(0.25))
    cache.finish()
    return cache, draw


@pytest.mark.parametrize("name", ["raas", "h2o", "tova"])
def test_a_compiled_step_is_one_graph_that_copies_no_cache(name: str, device: torch.device) -> None:
    """``tova`` is not fused: its attention is a kernel, its policy torch code."""
    eager, draw = open_cache(name, device)
    compiled, _ = open_cache(name, device)
    fed = [draw(1) for _ in range(6)]
    torch._dynamo.reset()
    step = torch.compile(run_layer, fullgraph=True, dynamic=False)
    codes: list[str] = []
    with torch.no_grad():
        for given in fed:
            for cache in (eager, compiled):
                cache.begin(1)
            wanted = eager.layers[0].forward(*given, Formula(0.25))
            got, code = run_and_get_code(step, compiled.layers[0], *given, Formula(0.25))
            codes += code
            eager.finish(), compiled.finish()
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    state = compiled.layers[0].state
    assert torch.equal(state.position.sort(-1).values, eager.layers[0].state.position.sort(-1).values)
    assert codes and all(
        f"torch.ops.kvpolicy.{'attend_slots' if name == 'tova' else 'decode_step'}" in c for c in codes
    )
    whole = re.escape(str(tuple(state.keys.shape)))
    for code in codes:
        assert not re.search(rf"empty_strided\w*\({whole}", code), "a tensor of the cache's shape is allocated"
        assert "clone(" not in code and "aten.copy" not in code


def test_the_op_keeps_its_contract(device: torch.device) -> None:
    """Its schema says exactly what it writes, and its fake kernel what it returns."""
    for name in ("raas", "scope-slide"):
        cache, draw = open_cache(name, device)
        cache.begin(1)
        fused = cache.layers[0].fused
        for update in (False, True):
            arguments = (*draw(1), fused.state[update], fused.given[update], 0.25, fused.names[update])
            torch.library.opcheck(decode_step, arguments, test_utils=("test_schema", "test_faketensor"))
            given = [tensor.clone() for tensor in fused.given[update]]
            written = [tensor.clone() for tensor in fused.state[update]]
            decode_step(*arguments)
            assert all(map(torch.equal, given, fused.given[update]))
            assert not torch.equal(written[0], fused.state[update][0])


@pytest.fixture(scope="module")
def resources() -> list[dict[str, Any]]:
    """Every launch of every shipped policy for Llama-3.1-8B's shape, compiled in a process without interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.attention.compiling_policies", "90"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_shipped_policies_compile_for_a_gpu_and_fit(resources: list[dict[str, Any]]) -> None:
    for row in resources:
        print(
            "{policy:20} {kind:6} {kernel:8} {warps:2} warps {shared:6} shared {registers:4} regs {stack}".format(**row)
        )
    assert {row["policy"] for row in resources} >= {"dense", "raas", "h2o", "scope-slide", "scope-discontinuous"}
    assert not [row for row in resources if row["stack"]], "registers spill"
    assert max(row["shared"] for row in resources) <= 227 * 1024
