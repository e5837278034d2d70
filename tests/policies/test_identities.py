"""Policies that must come to the same, on the runtime, with the oracle beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvpolicy.attention import Formula
from kvpolicy.language import Policy, Quantity, load_policy, loads_policy
from kvpolicy.oracle import Oracle
from kvpolicy.plan import ModelGeometry, make_plan, unsupported
from kvpolicy.runtime import PolicyCache
from kvpolicy.testing.attention import Attention
from kvpolicy.testing.feeding import OracleAlone, RuntimeBeside, plan_for, watch
from kvpolicy.testing.patterns import synthesize
from tests.invariants.policies import NAMES, roomy
from tests.policies.kit import kept, run

PATTERNS: dict[str, dict[str, Any]] = {
    "drift": {"pattern": "drift", "every": 16, "rows": 2},
    "ties": {"pattern": "ties"},
    "ragged noise": {"pattern": "uniform", "noise": 2, "prompt": [16, 5]},
}
TEXT = {"prompt": 16, "steps": 40, "layers": 1}


@pytest.fixture(params=PATTERNS)
def said(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**TEXT, **PATTERNS[request.param]}


def policy(pools: str) -> Policy:
    return loads_policy(f"kvpolicy: 1\nname: other\npools:\n{pools}")


def test_scope_discontinuous_with_interval_1_is_scope_adaptive(said: dict[str, Any]) -> None:
    params = {"alpha": 9, "alpha2": 3, "beta1": 12, "beta2": 6, "horizon": 12 + 6}
    one, other = (load_policy(f"scope-{kind}", set=params) for kind in ("discontinuous", "adaptive"))
    assert kept(one, **said) == kept(other, **said)


def test_scope_discontinuous_with_another_interval_is_not(said: dict[str, Any]) -> None:
    params = {"alpha": 9, "alpha2": 3, "beta1": 12, "beta2": 6, "horizon": 2 * 12 + 6}
    one, other = (load_policy(f"scope-{kind}", set=params) for kind in ("discontinuous", "adaptive"))
    assert kept(one, **said) != kept(other, **said)


def test_scope_adaptive_without_beta1_keeps_the_recent_alone(said: dict[str, Any]) -> None:
    adaptive = load_policy("scope-adaptive", set={"alpha": 9, "alpha2": 3, "beta1": 0, "beta2": 10, "horizon": 40})
    for seen in run(adaptive, runtime=True, **said):
        newest = min(10, seen.step.t)
        assert seen.kept("generated") == frozenset(range(seen.newest - newest + 1, seen.newest + 1))


def test_raas_that_touches_nothing_is_first_in_first_out_pages(said: dict[str, Any]) -> None:
    raas = load_policy("raas", set={"budget": 36, "page_size": 4, "touch": 0})
    fifo = policy("  prompt: {admit: prompt}\n  generated: {admit: generated, page: 4, budget: 36 - size(prompt)}")
    assert kept(raas, **said) == kept(fifo, **said)


def test_raas_that_touches_all_is_so_too(said: dict[str, Any]) -> None:
    none, everything = (load_policy("raas", set={"budget": 36, "page_size": 4, "touch": touch}) for touch in (0, 1))
    assert kept(none, **said) == kept(everything, **said)


def test_h2o_without_memory_is_scope_slide_without_the_prompts_pool(said: dict[str, Any]) -> None:
    h2o = load_policy("h2o", set={"heavy": 8, "recent": 6})
    forgetful = h2o.to_yaml().replace("queries: all, memory: sum", "memory: none")
    slide = policy("  all: {admit: all, budget: 8 + 6, window: 6, scorer: {signal: attention}}")
    assert "memory: none" in forgetful
    assert kept(loads_policy(forgetful), **said) == kept(slide, **said) != kept(h2o, **said)


def test_tova_over_one_kv_head_is_the_same_per_head(said: dict[str, Any]) -> None:
    tova, per_head = (
        load_policy("tova", set={"budget": 14}),
        policy("  all: {admit: all, budget: 14, scorer: {signal: attention}}"),
    )
    assert kept(tova, **said, kv_heads=1) == kept(per_head, **said, kv_heads=1)


def test_streaming_llm_without_sinks_is_a_window(said: dict[str, Any]) -> None:
    streaming, window = (
        load_policy("streaming-llm", set={"sinks": 0, "window": 13}),
        load_policy("window", set={"window": 13}),
    )
    assert kept(streaming, **said) == kept(window, **said)


def test_random_without_a_prompt_is_random_unpinned() -> None:
    pinned, unpinned = (load_policy(name, set={"budget": 14}) for name in ("random", "random-unpinned"))
    said = {"pattern": "uniform", "prompt": 0, "steps": 48}
    assert kept(pinned, **said) == kept(unpinned, **said)


def kept_by(policy: Policy, said: Attention) -> dict[tuple[int, ...], tuple[frozenset[int], frozenset[int]]]:
    """What is kept and attended to after every pass, of the runtime where it runs the policy, else of the oracle."""
    plan = plan_for(policy, said)
    feed = OracleAlone(plan) if any(unsupported(plan)) else RuntimeBeside(plan)
    return {(*seen.place, seen.newest): (seen.kept(), seen.attended()) for seen in watch(feed, said)}


SNAPKV = {"budget": 12, "window": 4, "kernel": 3}
LONG_PROMPT = {"pattern": "uniform", "noise": 2, "prompt": [40, 26], "steps": 6, "layers": 3}


def test_pyramidkv_with_beta_1_is_snapkv() -> None:
    said = synthesize(LONG_PROMPT)
    flat, steep = (load_policy("pyramidkv", set={**SNAPKV, "beta": beta}) for beta in (1, 4))
    assert kept_by(flat, said) == kept_by(load_policy("snapkv", set=SNAPKV), said) != kept_by(steep, said)


def test_ada_kv_that_gives_every_head_its_own_share_is_snapkv() -> None:
    said = synthesize(LONG_PROMPT)
    whole, some = (load_policy("ada-kv", set={**SNAPKV, "safeguard": share}) for share in ("100%", "20%"))
    assert kept_by(whole, said) == kept_by(load_policy("snapkv", set=SNAPKV), said) != kept_by(some, said)


def test_quest_that_may_read_everything_is_the_full_cache() -> None:
    said = synthesize({**TEXT, **PATTERNS["drift"], "layers": 3})
    dense = kept_by(load_policy("dense"), said)
    enough, few = (load_policy("quest", set={"page_size": 4, "budget": budget}) for budget in (16 + 40, 16))
    assert kept_by(enough, said) == dense != kept_by(few, said)


def test_raas_with_room_for_all_is_the_full_cache(said: dict[str, Any]) -> None:
    roomy = load_policy("raas", set={"budget": 16 + 40 + 4, "page_size": 4})
    assert kept(roomy, **said) == kept(load_policy("dense"), **said)


def rope(vectors: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotary embedding over D / 2 pairs of channels."""
    half = vectors.shape[-1] // 2
    angles = np.asarray(positions)[:, None] / 100.0 ** (np.arange(half) / half)
    a, b = vectors[..., :half], vectors[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)


def test_streaming_llm_is_one_thing_compact_or_absolute_until_it_evicts() -> None:
    """The compact one gets keys as they were before rotation, as the original stores them."""
    sizes, geometry = {"sinks": 2, "window": 10}, ModelGeometry("random", 1, 2, 1, 8)
    plans = [
        make_plan(load_policy(name, set=sizes), geometry, prompt=6, max_new_tokens=20)
        for name in ("streaming-llm", "streaming-llm-compact")
    ]
    absolute, compact = Oracle(plans[0]), Oracle(plans[1], rotate=rope)
    random = np.random.default_rng(0)
    queries, keys, values = (random.normal(size=(heads, 26, 8)) for heads in (2, 1, 1))
    outputs_are_the_same = []
    for span in (slice(0, 6), *(slice(at, at + 1) for at in range(6, 26))):
        places = np.arange(span.start, span.stop)
        query, key, value = queries[:, span], keys[:, span], [values[:, span]]
        one = absolute.step(0, [rope(query, places)], [rope(key, places)], value)[0]
        other = compact.step(0, [query], [key], value)[0]
        assert one.heads[0]["all"].kept == other.heads[0]["all"].kept
        outputs_are_the_same.append(np.allclose(one.output, other.output))
    # 12 tokens fit; the thirteenth, which sends the first away, still sees it where it was.
    assert outputs_are_the_same == [True] * 8 + [False] * 13


def test_slide_is_the_top_of_every_step_over_two_thousand_steps() -> None:
    """Dropping one token a step comes to the same as choosing the best beta1 of what is there anew, without slots."""
    steps, beta1, beta2 = 2000, 12, 6
    policy = load_policy("scope-slide", set={"alpha": 8, "alpha2": 2, "beta1": beta1, "beta2": beta2})
    plan = make_plan(policy, ModelGeometry("random", 1, 1, 1, 4), prompt=8, max_new_tokens=steps)
    cache, generator = PolicyCache(plan), torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(1, 1, 8 + steps, 4, generator=generator) for _ in range(3))
    held: list[int] = []
    for span in (slice(0, 8), *(slice(at, at + 1) for at in range(8, 8 + steps))):
        cache.begin(span.stop - span.start, kind="prompt" if span.start == 0 else "generated")
        cache.layers[0].forward(queries[:, :, span], keys[:, :, span], values[:, :, span], Formula(0.5))
        cache.finish()
        held += [at for at in range(span.start, span.stop) if at >= 8]
        if len(held) > beta1 + beta2:
            logits = (keys[0, 0, held[:-beta2]] @ queries[0, 0, span.start]).tolist()
            ranked = sorted(zip(logits, held[:-beta2], strict=True))
            held = sorted(place for _, place in ranked[-beta1:]) + held[-beta2:]
        now = cache.positions(0).flatten()
        assert sorted(now[now >= 0].tolist()) == [*range(8), *held]
    assert cache.stats()["evicted"] == steps - beta1 - beta2


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_at_least_the_length_is_the_full_cache(name: str) -> None:
    said = {**TEXT, **PATTERNS["drift"]}
    for seen in run(roomy(name), runtime=True, **said):
        assert seen.kept() == seen.attended() == frozenset(range(seen.newest + 1))


@pytest.mark.parametrize(("beta1", "beta2", "horizon"), [(256, 256, 4096), (768, 256, 4096), (7, 5, 100), (0, 3, 9)])
def test_scopes_budget_begins_with_the_window_and_ends_at_beta1_plus_beta2(
    beta1: int, beta2: int, horizon: int
) -> None:
    params = {"beta1": beta1, "beta2": beta2, "horizon": horizon}
    budget = load_policy("scope-adaptive", set=params).pools["generated"].budget
    assert isinstance(budget, Quantity)
    curve = [int(budget.evaluate({"t": t}) // 1) for t in range(2 * horizon)]
    assert curve[: beta2 + 1] == [beta2] * (beta2 + 1)
    assert set(curve[horizon:]) == {beta1 + beta2}
    for t in range(beta2 + 1, horizon):
        assert curve[t] == beta2 + (t - beta2) * beta1 // (horizon - beta2)
