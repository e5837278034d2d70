"""The arms beside other projects: what is timed on both sides is the same rule."""

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from kvpolicy.lab.bench.models import random_model
from kvpolicy.lab.peers import kvpress, kvpress_sets
from kvpolicy.language import loads_policy
from kvpolicy.patching import apply, cache_for
from kvpolicy.testing.attention import Attention

WORKERS = sorted(Path(kvpress.__file__).parent.glob("*_worker.py"))


@pytest.mark.parametrize("worker", WORKERS, ids=lambda path: path.stem)
def test_a_worker_imports_nothing_of_ours(worker):
    tree = ast.parse(worker.read_text())
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


def random_attention(length):
    random = np.random.default_rng(0)
    shapes = [(3, heads, length, 8) for heads in (4, 2, 2)]
    return Attention((length,), 0, *((random.normal(size=shape).astype(np.float32),) for shape in shapes))


@pytest.mark.parametrize("case", kvpress_sets.CASES, ids=lambda case: case.name)
def test_a_case_keeps_about_what_the_press_is_asked_to(case):
    kept = kvpress_sets.kept_by_us(case.ours(), random_attention(kvpress_sets.PROMPT))
    mean = sum(map(len, kept.values())) / len(kept)
    assert abs(mean - case.kept) <= 1 and int(kvpress_sets.PROMPT * (1 - case.theirs()["ratio"])) == case.kept


def test_every_departure_has_a_case_beside_it_that_does_not_depart():
    """But for one that the language cannot say: a score divided by how many queries could see the token."""
    same = {case.press for case in kvpress_sets.CASES if not case.departs}
    assert {case.press for case in kvpress_sets.CASES} - same == {"ObservedAttentionPress"}


def test_a_difference_that_nobody_named_is_found():
    case = next(case for case in kvpress_sets.CASES if case.name == "knorm")
    ours = {(0, 0): frozenset({1, 2}), (0, 1): frozenset({3, 4})}
    row = kvpress_sets.compared(case, ours, {**ours, (0, 1): frozenset({3, 5})})
    assert row.wrong and row.common == 3 and "layer 0, KV head 1: ours alone [4], theirs alone [5]" in str(row)
    assert not kvpress_sets.compared(case, ours, ours).wrong
    told = dataclasses.replace(case, departs="as the paper has it")
    assert not kvpress_sets.compared(told, ours, {**ours, (0, 1): frozenset({3, 5})}).wrong
