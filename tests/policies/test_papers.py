"""What the papers claim of one method over another, at equal budgets, in tokens."""

from __future__ import annotations

from collections import defaultdict

import pytest

from kvpolicy.language import Policy, load_policy, loads_policy
from tests.policies.kit import run

EVERY, WIDTH = 28, 4
MOVING = {"pattern": "drift", "prompt": 8, "steps": 4 * EVERY - 8, "every": EVERY, "width": WIDTH, "layers": 1}
"""Four important regions in turn, the first begun by the prompt."""

SCOPE = {
    "scope-slide": {},
    "scope-adaptive": {"horizon": EVERY},
    "scope-discontinuous": {"horizon": EVERY},
}


def in_use(policy: Policy, **attention: object) -> dict[int, float]:
    """First position of each region -> the least share of it that any KV head holds while it is the important one."""
    shares = defaultdict(lambda: 1.0)
    for seen in run(policy, **{**MOVING, **attention}):
        start = seen.newest // EVERY * EVERY
        region = {token for token in range(start, start + WIDTH) if token <= seen.newest}
        shares[start] = min(shares[start], len(region & seen.kept()) / len(region))
    return dict(shares)


def test_raas_keeps_a_used_milestone_where_others_lose_it() -> None:
    raas = in_use(load_policy("raas", set={"budget": 24, "page_size": 2}))
    assert raas == {0: 1, EVERY: 1, 2 * EVERY: 1, 3 * EVERY: 1}
    for name, params in {
        "h2o": {"heavy": 12, "recent": 12},
        "streaming-llm": {"sinks": 4, "window": 20},
        "window": {"window": 24},
        "random": {"budget": 24},
        "random-unpinned": {"budget": 24},
    }.items():
        assert in_use(load_policy(name, set=params))[3 * EVERY] == 0, name


def test_raas_keeps_every_phoenix_in_the_prompt_and_loses_them_when_the_prompt_has_a_budget() -> None:
    said = {"pattern": "phoenix", "prompt": 8, "steps": 40, "from": 44, "layers": 1}
    small = {"budget": 24, "page_size": 2}
    prompt = "{prompt: {budget: page_size, scorer: {signal: page-bound}}}"
    cut = loads_policy(f"kvpolicy: 1\nname: cut\nextends: raas\ntotal: null\npools: {prompt}", set=small)
    lost = []
    for at in range(8):
        assert all(at in seen.kept() for seen in run(load_policy("raas", set=small), **said, at=at))
        lost += [at] if all(at not in seen.kept() for seen in run(cut, **said, at=at)) else []
    assert lost == [0, 1, 2, 3, 4, 5]  # the newest page, 6 and 7, is protected


@pytest.mark.parametrize("name", SCOPE)
def test_scope_freezes_the_prompt_and_follows_what_an_accumulated_budget_for_all_loses(name: str) -> None:
    """Adaptive and discontinuous follow once their budgets have grown: the paper's formula begins with the window."""
    policy = load_policy(name, set={"alpha": 12, "alpha2": 4, "beta1": 6, "beta2": 6, **SCOPE[name]})
    frozen: dict[tuple[int, int, int], frozenset[int]] = {}
    for seen in run(policy, **{**MOVING, "prompt": EVERY, "steps": 3 * EVERY}):
        prompt = seen.kept("prompt")
        assert frozen.setdefault(seen.place, prompt) == prompt and len(prompt) == 12
    assert in_use(policy, prompt=EVERY, steps=3 * EVERY)[3 * EVERY] == 1
    unified = load_policy("h2o", set={"heavy": 12, "recent": 12})
    assert in_use(unified, prompt=EVERY, steps=3 * EVERY)[3 * EVERY] == 0


def test_tova_follows_too_but_gives_up_the_prompt() -> None:
    tova = load_policy("tova", set={"budget": 24})
    assert in_use(tova) == {0: 1, EVERY: 1, 2 * EVERY: 1, 3 * EVERY: 1}
    *_, last = run(tova, **MOVING)
    assert not last.kept() & set(range(8))
