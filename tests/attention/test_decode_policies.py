"""Whole policies on the triton backend: step by step they keep and remember what they do on the torch backend, and what
the oracle does.

Texts are small and ragged: the interpreter takes a twentieth of a second for one KV head of one row of a step.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy.attention import Formula, Rotation
from kvpolicy.errors import UsageError
from kvpolicy.language import Policy, loads_policy
from kvpolicy.plan import ModelGeometry, Plan, make_plan
from kvpolicy.plan.timeline import timeline
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.testing.beside import Beside, memories
from tests.attention.interpreting import quick_interpreter
from tests.invariants.policies import drops, thorough, tight, updates

GEOMETRY = ModelGeometry("random", layers=1, query_heads=2, kv_heads=1, head_dim=8)
FUSED = {"dense", "window", "streaming-llm", "h2o", "raas", "scope-slide", "scope-adaptive", "scope-discontinuous"}
"""Policies whose generated steps must be two launches; of the others it may be so."""


quick = pytest.fixture(autouse=True)(quick_interpreter)

Draw = Callable[[int], tuple[Tensor, Tensor, Tensor]]


def smooth(plan: Plan, device: torch.device) -> Draw:
    """Normal numbers."""
    generator, shape = torch.Generator().manual_seed(5), plan.geometry

    def draw(columns: int) -> tuple[Tensor, Tensor, Tensor]:
        heads = (shape.query_heads, shape.kv_heads, shape.kv_heads)
        numbers = (torch.randn(plan.batch, n, columns, shape.head_dim, generator=generator) for n in heads)
        query, key, value = (tensor.to(device) for tensor in numbers)
        return 2 * query, key, value

    return draw


def tied(plan: Plan, device: torch.device) -> Draw:
    """Few different keys and queries, of whole numbers, so that scores tie all the time and float32 is exact."""
    generator, shape = torch.Generator().manual_seed(6), plan.geometry

    def draw(columns: int) -> tuple[Tensor, Tensor, Tensor]:
        heads = (shape.query_heads, shape.kv_heads, shape.kv_heads)
        ones = (torch.randint(-1, 2, (plan.batch, n, columns, 1), generator=generator).float() for n in heads)
        query, key, value = ((one * torch.eye(shape.head_dim)[0] * 2).to(device) for one in ones)
        return query, key, value

    return draw


def kept(cache: PolicyCache, pool: str) -> Tensor:
    """Positions that a pool holds, in order, by row and KV head."""
    state = cache.layers[0].state
    return state.pool_positions(state.pools[pool]).flatten(2).sort(-1).values


def run(plan: Plan, device: torch.device, numbers: Callable[[Plan, torch.device], Draw], steps: int) -> PolicyCache:
    """A ragged prompt and ``steps`` tokens through the oracle and both backends; every step must leave the same."""
    draw, scaling = numbers(plan, device), plan.geometry.head_dim**-0.5
    out: list[Tensor] = []

    def generated(layer: PolicyLayer, *given: Any) -> Tensor:
        out.append(layer.forward(*given))
        return out[0]

    beside = Beside(plan, generated=generated, device=device, backend="triton")
    torch_cache = PolicyCache(plan, device=device, backend="torch", rotation=Rotation.none())
    low, high = plan.prompt
    lengths = torch.tensor([high] + [low] * (plan.batch - 1))
    prompt = (draw(high), torch.arange(high) >= high - lengths[:, None])
    for given, valid in (prompt, *((draw(1), None) for _ in range(steps))):
        kind = torch_cache.begin(given[0].shape[2], None if valid is None else valid.to(device))
        wanted = torch_cache.layers[0].forward(*given, Formula(scaling))
        torch_cache.finish()
        out.clear()
        beside.feed([given], valid)
        if kind != "prompt":
            torch.testing.assert_close(out[0], wanted, atol=1e-5, rtol=1e-5)
        for pool in plan.layers[0].pools:
            assert torch.equal(kept(beside.cache, pool.name), kept(torch_cache, pool.name)), (kind, pool.name)
        assert_remembered(memories(beside.cache, 0), memories(torch_cache, 0))
        for name in ("tail", "peak", "size"):
            for pool in plan.layers[0].pools:
                ours, theirs = (
                    cache.layers[0].state.tensors.get(f"{pool.name}.{name}") for cache in (beside.cache, torch_cache)
                )
                assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), name
    assert len(beside.agreement.near_ties) <= beside.agreement.compared // 100, beside.agreement.summary()
    return beside.cache


def assert_remembered(ours: list, theirs: list) -> None:
    """The same units remember the same: stamps exactly, sums as float32 holds them."""
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.keys() == yours.keys()
        for place, units in mine.items():
            assert units.keys() == yours[place].keys()
            for unit, memory in units.items():  # one number, or two
                assert memory == pytest.approx(yours[place][unit], rel=1e-5, abs=1e-6)


def small(policy: Policy, **sizes: int) -> Plan:
    return make_plan(policy, GEOMETRY, batch=2, prompt=(5, 24), max_new_tokens=sizes.get("steps", 64))


def long_enough(plan: Plan) -> int:
    """Steps until every pool of the shortest row has dropped a token, and then over two updates and two pages."""
    shortest = make_plan(plan.policy, plan.geometry, prompt=plan.prompt[0], max_new_tokens=plan.max_new_tokens)
    (layer,) = shortest.layers
    firsts = [line.first_eviction or 0 for line in timeline(shortest, layer)]
    rounds = [2 * max(pool.page, pool.cadence) for pool in layer.pools if pool.evicts]
    return min(plan.max_new_tokens, max(firsts) + max([4, *rounds]) + 2)


@pytest.mark.parametrize("name", thorough())
def test_shipped_policies(name: str, device: torch.device) -> None:
    plan = make_plan(tight(name), GEOMETRY, batch=2, prompt=(17, 24), max_new_tokens=64)
    cache = run(plan, device, tied, long_enough(plan))
    assert cache.layers[0].unfused_reason is None or name not in FUSED
    assert cache.stats()["evicted"] > 0 or not drops(plan)
    assert cache.passes["update"] > 0 or not updates(plan)


OTHERS = {
    "shrinking budget, several victims": "budget: max(4, 30 - t // 2 * 3)\nwindow: 2\nscorer: {signal: attention}",
    "a share of the text": "budget: 25% * context + 3\nwindow: 2\nscorer: {signal: attention-logit, heads: max}",
    "every third step": "budget: 12\nupdate: {every: 3}\nscorer: {signal: attention, memory: {decay: 0.9}}",
    "prompt end only": "budget: 12\nupdate: prompt-end\nscorer: {signal: attention, queries: all, memory: sum}",
    "growing window": "budget: 20\nwindow: min(12, t)\npinned: {first: 3}\nscorer: {signal: attention, heads: sum}",
    "window above budget": "budget: 5\nwindow: 5 + t // 9\nscorer: {signal: attention, weight: -2}",
    "max-decay": "budget: 15\nscorer: {signal: attention, memory: {max-decay: 0.8}}",
    "hits above": "budget: 15\nscorer: {signal: attention, hit: {above: 0.1}, memory: sum}",
    "hits of the pool": "budget: 9\nscorer: {signal: attention-logit, over: pool, hit: {top: 1/3}, memory: last-hit}",
    "pages by attention": "page: 3\nbudget: 15\nwindow: 4\nscorer: {signal: attention, memory: sum}",
    "pages by recency": "page: 4\nbudget: 13\nupdate: {every: 5}",
    "pages by bounds": "page: 4\nbudget: 16\npinned: {first: 3}\nscorer: {signal: page-bound}",
    "everything goes": "budget: max(0, 3 - t)\nscorer: {signal: attention}",
}


def one_pool(answers: str) -> Policy:
    lines = "".join(f"    {line}\n" for line in ["admit: all", *answers.splitlines()])
    return loads_policy(f"kvpolicy: 1\nname: one\npools:\n  all:\n{lines}")


@pytest.mark.parametrize("answers", OTHERS.values(), ids=OTHERS.keys())
def test_what_the_shipped_policies_do_not_say(answers: str, device: torch.device) -> None:
    cache = run(small(one_pool(answers), steps=12), device, smooth, 12)
    assert cache.layers[0].unfused_reason is None
    assert cache.stats()["evicted"] > 0


SECOND = {
    "two scorers": "budget: 12\nscorer:\n  sum: [{signal: attention}, {signal: key-norm, weight: -0.05}]",
    "smoothed": "budget: 12\nscorer: {signal: attention, smooth: {max: 5}}",
    "survivors": "budget: 14\nwindow: 2\npinned: survivors\nupdate: {every: 8}\nscorer: {signal: key-norm}",
}


@pytest.mark.parametrize("answers", SECOND.values(), ids=SECOND.keys())
def test_what_is_not_fused_attends_with_the_kernels(answers: str, device: torch.device) -> None:
    cache = run(small(one_pool(answers), steps=12), device, smooth, 12)
    assert cache.layers[0].fused is None and cache.layers[0].unfused_reason


def test_hits_ranked_over_pools_that_are_not_neighbours_in_size(device: torch.device) -> None:
    policy = loads_policy(
        "kvpolicy: 1\nname: two\npools:\n"
        "  prompt: {admit: prompt, page: 4}\n"
        "  generated:\n    admit: generated\n    page: 2\n    budget: 12 - size(prompt) // 4\n"
        "    scorer: {signal: attention, hit: {top: 1/3}, memory: last-hit}\n"
    )
    cache = run(make_plan(policy, GEOMETRY, batch=2, prompt=(5, 13), max_new_tokens=20), device, smooth, 20)
    assert cache.layers[0].unfused_reason is None


@pytest.mark.parametrize("name", ["raas", "h2o"])
def test_several_heads_and_an_odd_group(name: str, device: torch.device) -> None:
    geometry = ModelGeometry("random", layers=1, query_heads=6, kv_heads=2, head_dim=20)
    plan = make_plan(tight(name), geometry, batch=1, prompt=(24, 24), max_new_tokens=40)
    run(plan, device, smooth, 16)


def test_a_step_without_memory_does_no_policy_work(device: torch.device) -> None:
    layer = PolicyCache(small(tight("scope-discontinuous")), device=device, backend="triton").layers[0]
    assert layer.fused.forms[False].work is None and layer.fused.forms[True].work is not None
    assert layer.fused.launches == 2


def test_which_backend_a_cache_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small(tight("window"))
    assert PolicyCache(plan).backend == "torch" and "cpu" in PolicyCache(plan).backend_reason
    with pytest.raises(UsageError, match="one of auto, torch, triton"):
        PolicyCache(plan, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match=r"backend triton cannot run here.*TRITON_INTERPRET=1.*auto or torch"):
        PolicyCache(plan, backend="triton")
    wide = ModelGeometry("wide", layers=1, query_heads=2, kv_heads=1, head_dim=512)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match="at most 256 numbers, and these have 512"):
        PolicyCache(make_plan(tight("window"), wide, prompt=4, max_new_tokens=4), backend="triton")
