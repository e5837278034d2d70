"""Which lengths a cache is planned for, and that a new one compiles nothing."""

from dataclasses import replace

import pytest
import torch

from kvpolicy import PolicyError, UsageError, decode_loop
from kvpolicy.language import load_policy
from kvpolicy.patching import apply, compile_report, patch_of, remove
from kvpolicy.patching.lengths import SHARED, bucket
from kvpolicy.runtime.compiling import CompileReport
from tests.invariants.policies import NAMES, SHAPES, roomy, spread, tight


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids(length, rows=1):
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(length))


def generate(model, length, tokens=20, rows=1, **settings):
    return model.generate(ids(length, rows), do_sample=False, max_new_tokens=tokens, **settings)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 255, 256, 257, 1000])
def test_every_length_of_a_bucket_has_that_bucket(length):
    low, high = bucket((length, length))
    assert low <= length <= high and high - max(low, 0) <= SHARED
    for other in (low + (low > 1), high):
        assert bucket((other, other)) == (low, high)


@pytest.mark.parametrize(("name", "sized"), spread(NAMES, [tight, roomy], SHAPES))
def test_a_new_prompt_length_compiles_nothing(build, name, sized, fresh_dynamo):
    model = apply(build(), sized(name), compile="eager")
    lengths = [length for length in (5, 17, 33, 46, 128) if fits(model, length)]
    assert len(lengths) >= 3
    plan = generate(model, lengths[0], tokens=12, return_dict_in_generate=True).past_key_values.plan
    first = compile_report(model)
    assert 1 <= first.graphs <= 2 * len({replace(layer, index=0) for layer in plan.layers})
    for length in lengths:
        generate(model, length, tokens=12, custom_generate=decode_loop)
    assert compile_report(model) == first == CompileReport(graphs=first.graphs)


def fits(model, length):
    try:
        generate(model, length, tokens=1)
    except (UsageError, PolicyError):
        return False
    return True


def test_a_policy_without_room_for_a_bucket_has_its_longest(build, fresh_dynamo):
    """raas refuses prompts of its whole budget: every length that it takes, up to the longest, is planned alike."""
    model = apply(build(), "raas", budget=200, page_size=8, compile="eager")
    plans = set()
    for length in (129, 150, 170, 183):
        output = generate(model, length, return_dict_in_generate=True)
        plans.add(output.past_key_values.plan.prompt)
    assert len(plans) == 1
    ((low, high),) = plans
    assert low == 128 and high >= 183
    with pytest.raises((UsageError, PolicyError)):
        generate(model, high + 1)
    assert compile_report(model).recompiles == 0 and compile_report(model).graphs <= 2


@pytest.mark.parametrize("compile", ["eager", False])
@pytest.mark.parametrize("name", ["dense", "raas", "scope-discontinuous", "h2o"])
def test_room_said_once_is_one_cache_and_one_set_of_graphs(build, name, compile, fresh_dynamo):
    policy = tight(name) if name not in ("raas", "random") else load_policy(name, set={"budget": 260})
    model = apply(build(), policy)
    cases = [(9, 12), (17, 40), (140, 7), (200, 30)]
    expected = [generate(model, *case) for case in cases]
    remove(model)
    apply(model, policy, compile=compile, max_prompt=200, max_new_tokens=40)
    kept = set()
    for case, text in zip(cases, expected, strict=True):
        assert torch.equal(generate(model, *case, custom_generate=decode_loop), text)
        kept.add(patch_of(model).shelf._kept[0])
    assert len(kept) == 1
    assert compile_report(model).recompiles == 0 and compile_report(model).graphs <= 2
    assert kept.pop().cache.plan.prompt == (1, 200)


def test_more_than_was_said_is_refused(model, policies):
    apply(model, policies["window"], max_prompt=40, max_new_tokens=20)
    with pytest.raises(
        UsageError, match=r"a prompt of 41 tokens, and the policy was applied with max_prompt=40; apply"
    ):
        generate(model, 41)
    with pytest.raises(UsageError, match=r"room for 21 new tokens, and the policy was applied with max_new_tokens=20"):
        generate(model, 40, tokens=21)
    assert generate(model, 40).shape == (1, 60)


def test_one_of_the_two_leaves_the_other_to_the_call(model, policies):
    apply(model, policies["everything"], max_prompt=40)
    plan = generate(model, 9, tokens=5, return_dict_in_generate=True).past_key_values.plan
    assert (plan.prompt, plan.max_new_tokens) == ((1, 40), 5)
    remove(model)
    apply(model, policies["everything"], max_new_tokens=30)
    plan = generate(model, 9, tokens=5, return_dict_in_generate=True).past_key_values.plan
    assert (plan.prompt, plan.max_new_tokens) == ((9, 9), 30)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_that_reads_max_new_tokens_keeps_its_meaning(build, name):
    """Its numbers are those of each call; room for another number is refused, unless nothing reads it any more."""
    policy = load_policy(name)
    if not policy.reads("max_new_tokens"):
        apply(build(), policy, max_new_tokens=50)
        return
    model = build()
    with pytest.raises(UsageError, match=r"computes with max_new_tokens.*give horizon=… a number of its own"):
        apply(model, policy, max_new_tokens=50)
    assert not hasattr(model, "_kvpolicy")
    apply(model, policy, max_new_tokens=50, horizon=40)


def test_room_that_cannot_be_is_refused_when_it_is_said(model, policies):
    for said in ({"max_prompt": 0}, {"max_new_tokens": -3}):
        with pytest.raises(UsageError, match="give the most tokens that a call of generate will bring"):
            apply(model, policies["window"], **said)
    with pytest.raises((UsageError, PolicyError)):
        apply(model, "raas", budget=64, max_prompt=100)
    with pytest.raises(UsageError, match="there is no backend 'cuda'"):
        apply(model, policies["window"], backend="cuda")
    assert not hasattr(model, "_kvpolicy")


def test_a_cache_of_the_callers_own_is_not_bound_by_it(model, policies):
    from kvpolicy import cache_for

    apply(model, policies["window"], max_prompt=20, max_new_tokens=5, backend="torch")
    cache = cache_for(model, prompt=60, max_new_tokens=30)
    assert cache.backend == "torch" and cache.backend_reason == "asked for"
    assert generate(model, 60, tokens=30, past_key_values=cache).shape == (1, 90)
