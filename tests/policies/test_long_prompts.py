"""What methods for long prompts claim of one another, at equal budgets, in tokens and in attention."""

from __future__ import annotations

from typing import Any

import pytest

from kvpolicy.errors import UsageError
from kvpolicy.language import Policy, load_policy
from kvpolicy.testing.feeding import plan_for
from kvpolicy.testing.patterns import synthesize
from tests.policies.kit import run

LONG: dict[str, Any] = {
    "pattern": "milestone",
    "prompt": 40,
    "steps": 60,
    "at": 51,
    "until": 90,
    "layers": 1,
    "noise": 0,
}
"""A prompt longer than the budgets below, then a milestone among the generated tokens."""


def kept_while_used(policy: Policy, prompt: int) -> bool:
    """Whether the milestone 11 tokens after the prompt is there for as long as it is looked at."""
    said: dict[str, Any] = {**LONG, "prompt": prompt, "at": prompt + 11, "until": prompt + 50}
    return all(prompt + 11 in seen.kept() for seen in run(policy, **said) if prompt + 11 <= seen.newest <= prompt + 50)


def test_raas_loses_its_milestones_to_a_long_prompt_and_refuses_a_longer_one() -> None:
    raas = load_policy("raas", set={"budget": 24, "page_size": 2})
    assert kept_while_used(raas, prompt=8) and not kept_while_used(raas, prompt=20)
    with pytest.raises(UsageError, match="or shorten the prompt"):
        plan_for(raas, synthesize(LONG))


@pytest.mark.parametrize(
    ("name", "params"), [("raas-compressed-prompt", {"window": 4}), ("quest-raas", {"prompt_read": 8})]
)
def test_with_a_bounded_prompt_it_keeps_them_after_any_prompt(name: str, params: dict[str, int]) -> None:
    policy = load_policy(name, set={"budget": 24, "page_size": 2, **params})
    assert all(kept_while_used(policy, prompt) for prompt in (8, 20, 40, 200))
    attended = {len(seen.attended()) for seen in run(policy, **LONG) if seen.step.kind == "generated"}
    assert max(attended) <= 24 + 1


def test_quest_reads_again_what_compressed_prompts_have_lost() -> None:
    """A phoenix in the prompt that the prompt's last queries do not look at."""
    said: dict[str, Any] = {"pattern": "phoenix", "prompt": 40, "steps": 40, "at": "8..11", "from": 60, "layers": 3}

    def share(name: str, **params: int) -> float:
        policy = load_policy(name, set=params)
        return min(seen.full.mass(seen) for seen in run(policy, **said) if seen.newest >= 60 and seen.step.layer == 2)

    assert share("quest", budget=24, page_size=4) > 0.7
    assert share("quest-raas", budget=24, page_size=4, prompt_read=12) > 0.7
    assert share("snapkv", budget=24, window=4) < 0.5
    assert share("raas-compressed-prompt", budget=48, page_size=4, window=4) < 0.3


@pytest.mark.parametrize("seed", range(4))
def test_ada_kv_holds_more_of_what_the_window_looks_at_than_snapkv(seed: int) -> None:
    """Its reason: the best of all heads together hold at least as much as the best of each."""
    said: dict[str, Any] = {
        "pattern": "heavy-hitter",
        "prompt": 40,
        "steps": 1,
        "at": "5..20",
        "seen_by": 0,
        "noise": 1,
        "layers": 1,
    }
    params: dict[str, Any] = {"budget": 16, "window": 4, "kernel": 1}

    def held(policy: Policy) -> float:
        prompt = [seen for seen in run(policy, **said, seed=seed) if seen.step.kind == "prompt"]
        rows = [(seen.step.probabilities[seen.head][:, -4:].mean(axis=(0, 1)), sorted(seen.kept())) for seen in prompt]
        return sum(float(attention[kept].sum()) for attention, kept in rows)

    even, shared = load_policy("snapkv", set=params), load_policy("ada-kv", set={**params, "safeguard": 0})
    assert held(shared) > held(even)
