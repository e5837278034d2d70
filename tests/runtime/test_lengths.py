"""A plan's lengths: what a short prompt leaves room for is planned for, or refused before anything is overwritten."""

import pytest
import torch

from kvpolicy.errors import CacheError
from kvpolicy.language import Policy, load_policy, loads_policy
from kvpolicy.plan import ModelGeometry, Plan, make_plan
from kvpolicy.testing.beside import Beside

GEOMETRY = ModelGeometry("random", layers=1, query_heads=4, kv_heads=2, head_dim=8)
RAAS = load_policy("raas", set={"budget": 64, "page_size": 4})
SHRINKING = loads_policy(
    "kvpolicy: 1\nname: shrinking\npools:\n"
    "  prompt: {admit: prompt}\n"
    "  generated: {admit: generated, budget: 'max(8, 64 - prompt_len)', scorer: {signal: attention}}\n"
)


def fed(plan: Plan, *passes: int) -> Beside:
    """Turns of so many prompt tokens, each followed by so many generated ones."""
    beside, generator = Beside(plan), torch.Generator().manual_seed(0)
    for prompt, generated in zip(passes[::2], passes[1::2], strict=True):
        for columns, kind in [(prompt, "prompt"), *[(1, "generated")] * generated]:
            shapes = [(plan.batch, heads, columns, 8) for heads in (4, 2, 2)]
            beside.feed([tuple(torch.randn(shape, generator=generator) for shape in shapes)], kind=kind)  # type: ignore[misc]
    return beside


@pytest.mark.parametrize("policy", [RAAS, SHRINKING], ids=lambda policy: policy.name)
def test_a_short_first_turn_leaves_room_to_the_generated_tokens(policy: Policy) -> None:
    beside = fed(make_plan(policy, GEOMETRY, prompt=48, max_new_tokens=120, turns=2), 8, 80, 40, 40)
    counts = beside.cache.stats()["pools"]["generated"]
    assert counts["evicted"] > 0 and counts["peak"] > 48


@pytest.mark.parametrize("policy", [RAAS, SHRINKING], ids=lambda policy: policy.name)
def test_a_prompt_shorter_than_planned_is_refused_where_budgets_grow_with_it(policy: Policy) -> None:
    with pytest.raises(CacheError, match=r"at least 48 prompt tokens a row, and row 0 has 8.*prompt=\(8, 48\)"):
        fed(make_plan(policy, GEOMETRY, prompt=48, max_new_tokens=80), 8, 80)
    fed(make_plan(policy, GEOMETRY, prompt=(8, 48), max_new_tokens=80), 8, 80)


def test_a_prompt_shorter_than_planned_is_no_matter_to_a_policy_that_does_not_ask() -> None:
    fed(make_plan(load_policy("window", set={"window": 20}), GEOMETRY, prompt=48, max_new_tokens=40), 8, 40)


def test_a_prompt_that_is_cut_leaves_the_rest_of_a_total_to_others() -> None:
    cut = loads_policy(
        "kvpolicy: 1\nname: cut\nextends: raas\npools:\n"
        "  prompt: {page: null, budget: budget // 2, scorer: {signal: attention, queries: all, memory: sum}}\n",
        set={"budget": 96, "page_size": 4},
    )
    plan = make_plan(cut, GEOMETRY, prompt=78, max_new_tokens=100)
    assert [pool.bound for pool in plan.layers[0].pools] == [48, 48]
    assert fed(plan, 78, 100).cache.stats()["resident"] == 96


def test_what_else_takes_prompt_tokens_leaves_fewer_to_the_prompt() -> None:
    policy = loads_policy(
        "kvpolicy: 1\nname: special\npools:\n  marks: {admit: {tokens: special}}\n  prompt: {admit: prompt}\n"
        "  generated: {admit: generated, budget: 'max(4, 40 - size(prompt))'}\n"
    )
    pools = make_plan(policy, GEOMETRY, prompt=30, max_new_tokens=50).layers[0].pools
    assert pools[2].bound == 40  # all of the prompt may be special tokens
