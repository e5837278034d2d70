"""Compile the fused steps of every shipped policy for Llama-3.1-8B's shape, without a GPU. A line of JSON a launch.

python -m tests.attention.compiling_policies 80 90
"""

import json
import sys
from collections.abc import Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget

from kvpolicy.attention.kernels.launch import Launch, decode_launches
from kvpolicy.language import load_policy, shipped_policies
from kvpolicy.plan import ModelGeometry, make_plan
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.fused import Fusion
from kvpolicy.runtime.state import LayerState
from tests.attention.compiling import resources

LLAMA = ModelGeometry("llama", layers=1, query_heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
SIZES: dict[str, dict[str, object]] = {"raas": {"budget": 2048}, "random": {"budget": 2048}}
PROMPT, GENERATED, BATCH, PROCESSORS = 1024, 4096, 8, 132


def launches(name: str) -> Iterator[tuple[str, Launch]]:
    """The launches of a plain step and of one with update; none where the policy is not fused."""
    policy = load_policy(name, set=SIZES.get(name, {}))
    plan = make_plan(policy, LLAMA, batch=BATCH, prompt=PROMPT, max_new_tokens=GENERATED)
    fusion = Fusion.of(plan.layers[0], LLAMA)
    if isinstance(fusion, str):
        return
    meta = torch.device("meta")
    clocks = Clocks(plan, meta)
    step = fusion.bind(LayerState(plan.layers[0], meta, clocks), clocks)
    query, key = (torch.empty(BATCH, n, 1, 128, dtype=torch.bfloat16, device=meta) for n in (32, 8))
    for update in (False, True):
        form = step.forms[update]
        sides = ((form.state, step.state[update]), (form.given, step.given[update]))
        tensors = {
            role: tensor for side, held in sides for roles, tensor in zip(side, held, strict=True) for role in roles
        }
        for launch in decode_launches(form, query, key, key, tensors, 0.1, PROCESSORS)[1]:
            yield ("update" if update else "plain"), launch


def main(targets: list[int]) -> None:
    for name in shipped_policies():
        for kind, launch in launches(name):
            example = launch.example()
            options = {"num_warps": example.num_warps, "num_stages": example.num_stages}
            for target in targets:
                done = triton.compile(example.source(), target=GPUTarget("cuda", target, 32), options=options)
                row = {"policy": name, "kind": kind, "kernel": example.name, "warps": example.num_warps}
                row |= {"target": target, "shared": done.metadata.shared, **resources(done.asm["cubin"])}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
