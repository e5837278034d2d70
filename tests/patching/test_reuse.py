"""A decode loop gives back the cache that `generate` made for it, and the next call of like plan takes it."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

from kvpolicy import DecodeLoop, decode_loop
from kvpolicy.patching import applied, apply, cache_for, patch_of, remove
from kvpolicy.patching.caches import CacheBuilder
from kvpolicy.runtime import PolicyCache
from tests.invariants.policies import SHAPES, thorough, tight


@pytest.fixture
def lent(monkeypatch):
    """Every cache that `generate` ran on."""
    caches = []
    original = CacheBuilder.__call__

    def call(self, config, kwargs, *rest):
        original(self, config, kwargs, *rest)
        caches.append(kwargs["past_key_values"])

    monkeypatch.setattr(CacheBuilder, "__call__", call)
    return caches


@pytest.mark.parametrize("name", thorough(among=SHAPES))
def test_the_next_call_runs_on_the_same_tensors_and_says_the_same(build, padded, prompt, greedy, lent, name):
    model = apply(build(), tight(name))
    expected = [model.generate(**inputs, **greedy) for inputs in (padded, {"input_ids": prompt % 7 + 2}, padded)]
    del lent[:]
    settings = {"custom_generate": decode_loop, **greedy}
    steppers = []
    for inputs, text in zip((padded, {"input_ids": prompt % 7 + 2}, padded), expected, strict=True):
        assert torch.equal(model.generate(**inputs, **settings), text)
        steppers.append(patch_of(model).shelf._kept[0])
    # The padded batch may be planned for other lengths: then it had its own.
    plans = [cache.plan for cache in lent]
    for one, other in ((0, 1), (1, 2)):
        assert (lent[one] is lent[other]) == (plans[one] == plans[other]) == (steppers[one] is steppers[other])
    assert model.generate(**padded, **settings) is not None
    assert lent[-1] is lent[-2]


def test_a_reused_cache_is_as_if_it_were_new(model, policies, prompt, greedy, lent):
    for policy in policies.values():
        with applied(model, policy):
            model.generate(prompt, custom_generate=decode_loop, **greedy)
            model.generate(prompt, custom_generate=decode_loop, max_new_tokens=24, do_sample=False)
            reused = lent[-1]
            assert reused is lent[-2]
            fresh = model.generate(prompt, return_dict_in_generate=True, max_new_tokens=24, do_sample=False)
            other = fresh.past_key_values
            # It was on the shelf, so the caller has it now, and the loop starts on another.
            assert other is reused
            model.generate(prompt, custom_generate=decode_loop, **greedy)
            mine = lent[-1]
            assert mine is not reused
            assert mine.stats() == reused.stats()
            for one, two in zip(mine.layers, other.layers, strict=True):
                assert all(torch.equal(one.state.tensors[key], two.state.tensors[key]) for key in one.state.tensors)


@pytest.mark.parametrize("settings", [{"return_dict_in_generate": True}, {"own": True}, {"stock": True}], ids=str)
def test_a_cache_that_another_may_have_is_never_kept(model, policies, prompt, greedy, settings):
    apply(model, policies["window"])
    loop = None if settings.pop("stock", False) else decode_loop
    if settings.pop("own", False):
        settings["past_key_values"] = cache_for(model, prompt=17, max_new_tokens=24, batch=2)
    model.generate(prompt, custom_generate=loop, **settings, **greedy)
    assert len(patch_of(model).shelf) == 0


def test_a_returned_cache_that_comes_back_stays_the_callers(model, policies, prompt, greedy):
    apply(model, policies["window"])
    settings = {"custom_generate": decode_loop, **greedy}
    output = model.generate(prompt, return_dict_in_generate=True, **settings)
    text = torch.cat([output.sequences, output.sequences[:, :3]], 1)
    model.generate(text, past_key_values=output.past_key_values, **settings)
    assert len(patch_of(model).shelf) == 0


def test_what_failed_is_dropped(model, policies, prompt, greedy):
    apply(model, policies["window"])
    model.generate(prompt, custom_generate=decode_loop, **greedy)
    assert len(patch_of(model).shelf) == 1
    hook = model.model.layers[2].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(prompt, custom_generate=decode_loop, **greedy)
    hook.remove()
    assert len(patch_of(model).shelf) == 0


def test_at_most_one_is_kept_and_none_while_another_is_made(model, policies, prompt, greedy, lent, monkeypatch):
    apply(model, policies["window"])
    model.generate(prompt, custom_generate=decode_loop, **greedy)
    gone = weakref.ref(lent.pop())
    alive = []
    original = PolicyCache.__init__

    def init(self, *args, **kwargs):
        alive.append(gone())
        original(self, *args, **kwargs)

    monkeypatch.setattr(PolicyCache, "__init__", init)
    model.generate(prompt[:1], custom_generate=decode_loop, **greedy)
    assert alive == [None]  # freed without a collection: memory is never needed twice
    assert len(patch_of(model).shelf) == 1


def test_two_calls_at_once_have_two_caches(model, policies, prompt, greedy, lent):
    apply(model, policies["window"])
    expected = model.generate(prompt, **greedy)
    model.generate(prompt, custom_generate=decode_loop, **greedy)
    del lent[:]
    texts = []

    def generate():
        texts.append(model.generate(prompt, custom_generate=DecodeLoop(check_every=4), **greedy))

    threads = [threading.Thread(target=generate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 4 and all(torch.equal(text, expected) for text in texts)
    assert len(patch_of(model).shelf) == 1


def test_copies_and_pickles_carry_none_and_removal_frees_it(model, policies, prompt, greedy, lent):
    apply(model, policies["window"])
    expected = model.generate(prompt, custom_generate=decode_loop, **greedy)
    size = len(pickle.dumps(model))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(patch_of(again).shelf) == 0
        assert torch.equal(again.generate(prompt, custom_generate=decode_loop, **greedy), expected)
        assert patch_of(again).shelf._kept[0].model is again
    patch_of(model).shelf.clear()
    assert abs(size - len(pickle.dumps(model))) < 100
    model.generate(prompt, custom_generate=decode_loop, **greedy)
    gone = weakref.ref(lent[-1])
    del lent[:], again
    remove(model)
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight + 0.5)),
        lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
    ],
    ids=["dtype", "weight", "assign"],
)
def test_a_model_whose_weights_moved_starts_anew(model, policies, prompt, greedy, lent, change):
    """What was recorded reads the old weights."""
    apply(model, policies["window"])
    model.generate(prompt, custom_generate=decode_loop, **greedy)
    change(model)
    assert torch.equal(model.generate(prompt, custom_generate=decode_loop, **greedy), model.generate(prompt, **greedy))
    assert lent[0] is not lent[1]
