"""Policies that must come to the same (methods.md section 8), on the runtime, with the oracle beside it."""

from __future__ import annotations

from typing import Any

import pytest

from kvpolicy.language import Policy, Quantity, load_policy, loads_policy
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
