"""Apply, then remove: the model is what it was, object for object; and only the model that was patched ever changes."""

import copy
from contextlib import suppress

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvpolicy.patching.patch as patch_module
from kvpolicy import UsageError
from kvpolicy.architecture import architecture_of
from kvpolicy.patching import applied, apply, cache_for, patch_of, remove


def portrait(model):
    """Every attribute of every module by identity, every hook, and the config's contents."""
    modules = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key == "rope_deltas":  # what transformers itself notes of the last prompt
                continue
            modules[name, key] = dict(value) if "hooks" in key else id(value)
            if key in ("_parameters", "_buffers", "_modules"):
                modules[name, key] = {inner: id(held) for inner, held in value.items()}
    return modules, copy.deepcopy(model.config.__dict__)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("compile", [None, "eager"])
def test_removal_leaves_nothing_behind(build, family, compile, policies, prompt, greedy):
    model = build(family)
    model.generate(prompt, **greedy)  # so that whatever transformers makes lazily is there already
    before, expected = portrait(model), logits(model, prompt)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for policy in (policies["window"], policies["paged"]):
        apply(model, policy, compile=compile)
        model.generate(prompt, **greedy)
        remove(model)
        assert portrait(model) == before
    assert torch.equal(logits(model, prompt), expected)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_registrations_are_made_once_and_touch_no_other(build, policies):
    before = dict(ALL_ATTENTION_FUNCTIONS)
    for _ in range(2):
        model = apply(build(), policies["window"])
        remove(model)
    added = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS if name not in before}
    assert set(added) <= {"kvp|sdpa"}
    assert all(ALL_ATTENTION_FUNCTIONS[name] is function for name, function in before.items())
    remove(apply(build(), policies["window"]))
    assert all(ALL_ATTENTION_FUNCTIONS[name] is function for name, function in added.items())


@pytest.mark.parametrize("step", range(1, 30, 4))
def test_an_exception_in_the_middle_of_apply_undoes_what_was_done(model, policies, monkeypatch, step):
    before = portrait(model)
    calls = 0
    for name in ("set", "before", "after", "own_configs"):
        change = getattr(patch_module.Journal, name)

        def counted(self, *args, change=change):
            nonlocal calls
            calls += 1
            if calls == step:
                raise KeyboardInterrupt
            return change(self, *args)

        monkeypatch.setattr(patch_module.Journal, name, counted)
    with suppress(KeyboardInterrupt):
        apply(model, policies["window"], compile="eager")
        assert calls < step, "the exception was swallowed"
        remove(model)
    assert portrait(model) == before


def test_an_exception_in_a_with_block_takes_the_policy_off(model, policies, prompt):
    before = portrait(model)
    with pytest.raises(ZeroDivisionError), applied(model, policies["window"]) as same:
        assert same is model
        assert patch_of(model).policy.name == "window"
        raise ZeroDivisionError
    assert portrait(model) == before


def test_an_exception_in_the_middle_of_a_pass(model, policies, prompt, greedy):
    """The half-written cache refuses to go on; the model runs other caches, and comes off clean."""
    before = portrait(model)
    apply(model, policies["window"])
    expected = model.generate(prompt, **greedy)
    cache = cache_for(model, prompt=17, max_new_tokens=24, batch=2)
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        logits(model, prompt, past_key_values=cache)
    handle.remove()
    with pytest.raises(RuntimeError, match="failed halfway"):
        logits(model, prompt[:, :1], past_key_values=cache)
    assert torch.equal(model.generate(prompt, **greedy), expected)
    cache.reset()
    assert torch.equal(model.generate(prompt, past_key_values=cache, **greedy), expected)
    remove(model)
    assert portrait(model) == before


def test_two_policies_on_one_model_are_refused(model, policies):
    apply(model, policies["window"])
    with pytest.raises(UsageError, match="already"):
        apply(model, policies["paged"])
    with pytest.raises(UsageError, match="already"):
        apply(model.model, policies["paged"])
    remove(model)
    apply(model.model, policies["paged"])
    with pytest.raises(UsageError, match="already"):
        apply(model, policies["window"])
    remove(model.model)
    with pytest.raises(UsageError, match="carries no policy"):
        remove(model)


def test_another_instance_is_untouched_even_one_of_the_same_config_object(build, policies, prompt, greedy):
    first = build()
    second = type(first)(first.config).eval()
    assert second.config is first.config
    before, expected = portrait(second), second.generate(prompt, **greedy)
    before = portrait(second)
    apply(first, policies["window"])
    assert portrait(second) == before
    assert torch.equal(second.generate(prompt, **greedy), expected)
    apply(second, policies["paged"])
    remove(first)
    assert patch_of(second).policy.name == "paged"
    second.generate(prompt, **greedy)
    remove(second)
    assert portrait(second) == before


def test_what_the_user_sets_meanwhile_stays(model, policies):
    config = model.config
    apply(model, policies["window"])
    model.config.pad_token_id = 5
    model.config.note = "mine"
    del model.config.bos_token_id
    model.model.layers[0]._forward_pre_hooks[10**6] = mine = lambda *_: None
    remove(model)
    assert model.config is config
    assert (config.pad_token_id, config.note) == (5, "mine")
    assert "bos_token_id" not in config.__dict__
    assert list(model.model.layers[0]._forward_pre_hooks.values()) == [mine]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_any_other_cache_runs_as_if_never_patched(build, family, implementation, policies, padded, greedy):
    """Bit for bit: no cache, the default cache, a static one, beams, sampling, with padding."""
    model = build(family, attn_implementation=implementation)
    ids, mask = padded["input_ids"], padded["attention_mask"]

    def everything():
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = model(ids, attention_mask=mask, output_attentions=implementation == "eager")
        static = StaticCache(config=model.config, max_cache_len=64)
        yield from (outputs.logits, *(outputs.attentions or ()))
        yield logits(model, ids, attention_mask=mask, past_key_values=DynamicCache())
        yield model.generate(**padded, past_key_values=DynamicCache(), **greedy)
        yield model.generate(**padded, past_key_values=static, **greedy)
        yield model.generate(**padded, cache_implementation="static", **greedy)
        yield model.generate(**padded, use_cache=False, **greedy)
        yield model.generate(**padded, cache_implementation="dynamic", num_beams=2, **greedy)
        yield model.generate(**padded, cache_implementation="dynamic", do_sample=True, max_new_tokens=12)

    expected = list(everything())
    apply(model, policies["window"])
    decoder = model.base_model.get_submodule(architecture_of(family).decoder)
    assert decoder.config._attn_implementation == f"kvp|{implementation}"
    for before, now in zip(expected, everything(), strict=True):
        assert torch.equal(before, now)


def test_training_runs_as_before(model, policies, prompt):
    def gradients():
        model.zero_grad()
        model(prompt, labels=prompt, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    expected = gradients()
    apply(model, policies["window"])
    assert all(torch.equal(old, new) for old, new in zip(expected, gradients(), strict=True))
