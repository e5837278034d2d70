"""The arms beside other projects: what is timed on both sides is the same rule."""

import ast
from pathlib import Path

import pytest
import torch

from kvpolicy.lab.bench.models import random_model
from kvpolicy.lab.peers import kvpress
from kvpolicy.language import loads_policy
from kvpolicy.patching import apply, cache_for

WORKER = Path(kvpress.__file__).with_name("kvpress_worker.py")


def test_the_worker_imports_nothing_of_ours():
    tree = ast.parse(WORKER.read_text())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not any(name.startswith("kvpolicy") for name in names)


@pytest.mark.parametrize("every", [16, 1])
@torch.no_grad()
def test_the_rule_keeps_the_smallest_norms(every):
    """Knorm as kvpress has it: of all keys that are there at an update, the budget's worth of least norm stay."""
    model = random_model("smollm2-135m", layers=1, dtype="float32", device=torch.device("cpu"))
    apply(model, loads_policy(kvpress.KNORM.format(budget=24, every=every)))
    cache = cache_for(model, prompt=24, max_new_tokens=32)
    model(torch.arange(24)[None], past_key_values=cache)
    state = cache.layers[0].state
    seen: dict[int, torch.Tensor] = {}
    for step in range(32):
        model(torch.tensor([[step]]), past_key_values=cache)
        kept = state.position[0, 0]
        norms = state.keys[0, 0].norm(dim=-1)
        now = {int(place): float(norm) for place, norm in zip(kept, norms, strict=True) if place >= 0}
        assert len(now) == 24 + (step + 1) % every
        seen.update({place: torch.tensor(norm) for place, norm in now.items() if place not in seen})
        if (step + 1) % every == 0 and every > 1:
            gone = [norm for place, norm in seen.items() if place not in now]
            assert min(gone) >= max(now.values()) - 1e-5
            seen = {place: torch.tensor(norm) for place, norm in now.items()}
    assert cache.stats()["evicted"] == 32 * 3
