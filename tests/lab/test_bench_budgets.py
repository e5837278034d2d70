"""A budget is given to any policy: what the plan then holds, which params are touched, and what is refused."""

import pytest

from kvpolicy import load_policy, loads_policy
from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.budgets import held_by, with_budget
from kvpolicy.lab.bench.cases import LOOKED_AT, WARM, full_cache, policy_case
from kvpolicy.language import Policy, shipped_policies
from kvpolicy.plan import ModelGeometry, make_plan
from kvpolicy.plan.timeline import timeline
from tests.invariants.policies import thorough

SHAPE = ModelGeometry("llama", 4, 4, 2, 8)


def is_bounded(name: str) -> bool:
    """Whether what a policy holds stays the same when the answer gets longer, and so can be held to a budget at all.

    What pools pass on to one another has two budgets, and is given them by hand.
    """
    policy = load_policy(name)
    plans = [make_plan(policy, SHAPE, prompt=100, max_new_tokens=steps) for steps in (100_000, 200_000)]
    feeds = any(pool.to for layer in plans[0].layers for pool in layer.pools)
    return plans[0].resident_bound == plans[1].resident_bound and not feeds


EVICTING = [name for name in shipped_policies() if is_bounded(name)]


def policy_of(params: str, pools: str, more: str = "") -> Policy:
    return loads_policy(f"kvpolicy: 1\nname: mine\nparams: {params}\npools: {pools}\n{more}")


@pytest.mark.parametrize("budget", [160, 1000])
@pytest.mark.parametrize("name", thorough(EVICTING))
def test_every_shipped_policy_holds_the_budget(name: str, budget: int) -> None:
    """The bound is that of a plan made anew with the settings that are told, and within a page of what was asked."""
    policy = load_policy(name)
    found = with_budget(policy, budget, SHAPE, prompt=budget // 2, max_new_tokens=4 * budget)
    plan = make_plan(load_policy(name, set=found.settings), SHAPE, prompt=budget // 2, max_new_tokens=4 * budget)
    page = max(pool.page for layer in plan.layers for pool in layer.pools)
    assert found.held == held_by(plan) == plan.resident_bound
    assert abs(found.held - budget) <= (page if page > 1 else 2)
    assert found.plan == plan


def test_sizes_keep_their_proportions_and_nothing_else_changes() -> None:
    found = with_budget(load_policy("scope-slide"), 1024, SHAPE, prompt=3000, max_new_tokens=500)
    assert found.settings == {"alpha": "820", "beta1": "102", "beta2": "102"}
    found = with_budget(load_policy("h2o"), 300, SHAPE, prompt=3000, max_new_tokens=500)
    assert found.settings == {"heavy": "150", "recent": "150"}


def test_params_that_were_set_stay() -> None:
    given = {"beta1": "64", "beta2": "32"}
    found = with_budget(load_policy("scope-slide"), 512, SHAPE, prompt=3000, max_new_tokens=500, given=given)
    assert found.settings == given | {"alpha": "416"}


def test_a_page_is_no_size() -> None:
    policy = policy_of(
        "{keep: {default: 512, help: h}, leaf: {default: 16, help: h}}",
        "{all: {admit: all, page: leaf, budget: keep, scorer: {signal: page-bound}}}",
    )
    found = with_budget(policy, 128, SHAPE, prompt=300, max_new_tokens=300)
    assert found.settings == {"keep": "128"}


def test_a_share_of_the_prompt_is_scaled_as_a_share() -> None:
    policy = policy_of("{part: {default: 20%, help: h}}", "{all: {admit: all, budget: part * prompt_len}}")
    found = with_budget(policy, 500, SHAPE, prompt=1000, max_new_tokens=300)
    assert found.settings == {"part": "0.5"} and found.held == 500


def test_layers_that_differ_hold_the_budget_on_average() -> None:
    policy = policy_of("{keep: {default: 64, help: h}}", "{all: {admit: all, budget: keep * (layer + 1)}}")
    found = with_budget(policy, 100, SHAPE, prompt=1000, max_new_tokens=300)
    assert found.settings == {"keep": "40"}
    assert [layer.bound for layer in found.plan.layers] == [40, 80, 120, 160]


def test_without_a_size_the_way_out_is_named() -> None:
    policy = policy_of(
        "{seed: {default: 3, help: h}}", "{all: {admit: all, budget: 64, scorer: {signal: {random: {seed: seed}}}}}"
    )
    with pytest.raises(UsageError, match="--set"):
        with_budget(policy, 100, SHAPE, prompt=1000, max_new_tokens=300)
    assert with_budget(policy, 64, SHAPE, prompt=1000, max_new_tokens=300).settings == {}


def test_a_prompt_that_cannot_fit_says_so() -> None:
    with pytest.raises(UsageError, match=r"prompt of 2,000.*raas keeps at most 1024 tokens in all"):
        with_budget(load_policy("raas"), 1024, SHAPE, prompt=2000, max_new_tokens=300)


# Cases: the text of an arm


@pytest.mark.parametrize("name", thorough(EVICTING))
def test_a_policy_is_timed_when_it_evicts(name: str) -> None:
    """Between the warm-up and the last step something leaves every pool that takes generated tokens."""
    case = policy_case(load_policy(name), name, SHAPE, context=1000, budget=128, batch=2, steps=32)
    assert case.plan.batch == 2 and abs(case.held - 128) <= 16 and case.fires
    assert case.warm + 32 == case.plan.max_new_tokens and case.warm >= WARM
    assert case.prompt + case.warm + 32 <= 1000
    for pool, line in zip(case.plan.layers[0].pools, timeline(case.plan, case.plan.layers[0]), strict=True):
        if pool.evicts and "generated" in pool.admits and pool.cadence <= 32:  # a slower one may rest in between
            kept, came = line.resident[-1] - line.resident[case.warm - 2 * LOOKED_AT], 32 + 2 * LOOKED_AT
            assert kept < came, "it only grows"


def test_who_pins_its_prompt_reads_what_fits() -> None:
    raas = policy_case(load_policy("raas"), "raas", SHAPE, context=4096, budget=1024, batch=1, steps=32)
    assert raas.prompt == 960 and "960" in raas.note
    h2o = policy_case(load_policy("h2o"), "h2o", SHAPE, context=4096, budget=1024, batch=1, steps=32)
    assert h2o.prompt + h2o.plan.max_new_tokens == 4096 and not h2o.note


def test_a_short_prompt_is_read_and_steps_make_up_for_it() -> None:
    case = policy_case(load_policy("window"), "w", SHAPE, context=4096, budget=256, batch=1, steps=32, prompt=100)
    assert case.prompt == 100 and case.warm >= 156


def test_a_full_cache_is_full_after_the_last_step() -> None:
    case = full_cache(load_policy("dense"), 512, SHAPE, batch=1, steps=32)
    assert {layer.slots for layer in case.plan.layers} == {512} == {case.slots}
    assert case.prompt == case.room == 512 - WARM - 32
    short = full_cache(load_policy("dense"), 512, SHAPE, batch=1, steps=32, prompt=50)
    assert (short.prompt, short.room, short.slots) == (50, case.room, 512)


@pytest.mark.parametrize(
    ("context", "budget", "said"), [(512, 512, "nothing to evict"), (60, 50, "evicts nothing within a context of 60")]
)
def test_what_cannot_evict_is_refused(context: int, budget: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        policy_case(load_policy("tova"), "tova", SHAPE, context=context, budget=budget, batch=1, steps=32)


def test_no_room_for_the_steps_is_refused() -> None:
    with pytest.raises(UsageError, match="no room for 48 steps"):
        full_cache(load_policy("dense"), 48, SHAPE, batch=1, steps=32)
