"""Patched models can be copied, pickled, saved and loaded; every copy stands on its own."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvpolicy import ModelError
from kvpolicy.patching import apply, from_pretrained, patch_of, remove


@pytest.fixture(params=[None, "eager"], ids=["eager", "compiled"])
def patched(request, build, policies):
    return apply(build(), policies["scored"], compile=request.param)


def equal_but_apart(first, second, prompt, greedy):
    """Both run the policy, and taking it off one leaves it on the other."""
    expected = first.generate(prompt, **greedy)
    assert torch.equal(second.generate(prompt, **greedy), expected)
    assert patch_of(second) is not patch_of(first)
    assert second._prepare_cache_for_generation.model is second
    assert second.config is not first.config
    remove(first)
    dense = first.generate(prompt, **greedy)
    assert not torch.equal(dense, expected)
    assert torch.equal(second.generate(prompt, **greedy), expected)
    assert second.config._attn_implementation == "kvp|sdpa"
    remove(second)
    assert torch.equal(second.generate(prompt, **greedy), dense)
    for model in (first, second):
        assert not any("kvpolicy" in key or key == "_prepare_cache_for_generation" for key in model.__dict__)
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert model.config._attn_implementation == "sdpa"
        assert not hasattr(model.config, "kv_policy")


def test_deepcopy(patched, prompt, greedy):
    equal_but_apart(patched, copy.deepcopy(patched), prompt, greedy)


def test_pickle(patched, prompt, greedy):
    equal_but_apart(patched, pickle.loads(pickle.dumps(patched)), prompt, greedy)


def test_torch_save(patched, prompt, greedy, tmp_path):
    torch.save(patched, tmp_path / "model.pt")
    equal_but_apart(patched, torch.load(tmp_path / "model.pt", weights_only=False), prompt, greedy)


def test_a_pickle_runs_in_a_process_that_applied_nothing(build, policies, prompt, greedy, tmp_path):
    model = apply(build(), policies["scored"])
    expected = model.generate(prompt, **greedy).tolist()
    static = model.generate(prompt, cache_implementation="static", **greedy).tolist()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((model, prompt, greedy)))
    code = (
        "import pickle, sys, json\n"
        "model, prompt, greedy = pickle.load(open(sys.argv[1], 'rb'))\n"
        "static = model.generate(prompt, cache_implementation='static', **greedy).tolist()\n"
        "print(json.dumps([model.generate(prompt, **greedy).tolist(), static]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pkl")], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout.splitlines()[-1]) == [expected, static]


def test_saved_with_its_policy_and_loaded_with_it(build, family, policies, prompt, greedy, tmp_path):
    model = apply(build(family), policies["scored"])
    expected = model.generate(prompt, **greedy)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["kv_policy"]
    assert {"format", "name", "digest", "yaml"} == set(saved)
    assert (saved["format"], saved["name"], saved["digest"]) == (1, "scored", policies["scored"].digest)

    plain = type(model).from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa"
    dense = plain.generate(prompt, **greedy)
    assert not torch.equal(dense, expected)

    both = from_pretrained(tmp_path, model_class=type(model))
    assert patch_of(both).policy == policies["scored"]
    assert torch.equal(both.generate(prompt, **greedy), expected)
    assert both.config.kv_policy == saved
    remove(both)
    assert not hasattr(both.config, "kv_policy")
    assert torch.equal(both.generate(prompt, **greedy), dense)


def test_params_are_saved_as_they_were_set(build, prompt, greedy, tmp_path):
    model = apply(build(), "raas", budget=40, page_size=4)
    model.save_pretrained(tmp_path)
    policy = patch_of(from_pretrained(tmp_path)).policy
    assert policy == patch_of(model).policy
    assert policy.digest == patch_of(model).policy.digest


def test_no_trace_in_what_is_saved_after_removal(build, policies, tmp_path):
    model = apply(build(), policies["scored"])
    remove(model)
    model.save_pretrained(tmp_path)
    assert "kv" not in {key.split("_")[0] for key in json.loads((tmp_path / "config.json").read_text())}
    with pytest.raises(ModelError, match="saved without a policy"):
        from_pretrained(tmp_path)


def edit(tmp_path, **changes):
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["kv_policy"].update(changes)
    path.write_text(json.dumps(config))


def test_what_cannot_be_loaded(build, policies, tmp_path):
    apply(build(), policies["window"]).save_pretrained(tmp_path)
    edit(tmp_path, digest="0" * 12)
    with pytest.raises(ModelError, match="edited by hand"):
        from_pretrained(tmp_path)
    edit(tmp_path, format=2)
    with pytest.raises(ModelError, match="format 2, and this kvpolicy reads 1"):
        from_pretrained(tmp_path)


def test_a_policy_applied_over_a_recorded_one(build, policies, tmp_path):
    """A model loaded without its policy can be given another; taking that off brings the record back."""
    apply(build(), policies["window"]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    apply(model, policies["paged"])
    assert model.config.kv_policy["name"] == "paged"
    remove(model)
    assert model.config.kv_policy["name"] == "window"
