"""Which models can be patched: families stated in patches/, plug-ins, and clear words for the rest."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import kvpolicy
import kvpolicy.architecture as architecture
from kvpolicy import ModelError, UsageError
from kvpolicy.patching import apply


def refusal(model, policy="window", **params):
    with pytest.raises((ModelError, UsageError)) as caught:
        apply(model, policy, **params)
    assert "kvp|" not in str(model.config._attn_implementation)
    return caught.value


def test_the_families_of_the_papers_are_known_without_torch():
    code = (
        "import sys; from kvpolicy.architecture import architectures;"
        "print(*architectures()); assert 'torch' not in sys.modules"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"llama", "mistral", "qwen2", "qwen3"} <= set(printed.split())


def test_every_family_is_patched_and_covers_something(build, family, policies, prompt):
    assert architecture.architecture_of(family).covers
    model = apply(build(family), policies["window"])
    assert model.generate(prompt, do_sample=False, max_new_tokens=5).shape == (2, 22)


def test_an_unknown_architecture_is_refused_with_the_list():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    error = refusal(model)
    assert error.exit_code == 4
    assert "'gpt2'" in str(error)
    assert ", ".join(sorted(architecture.architectures())) in str(error)


def test_two_owners_of_one_model_type_are_both_named(monkeypatch):
    again = architecture.Architecture(model_types=("llama",), covers="a copy")
    monkeypatch.setattr(architecture, "_plugged_in", lambda: iter([("entry point mine = mine:ARCHITECTURE", again)]))
    architecture.architectures.cache_clear()
    with pytest.raises(ModelError, match=r"kvpolicy\.patches\.llama\.ARCHITECTURE and entry point mine"):
        architecture.architectures()
    architecture.architectures.cache_clear()


def test_a_plug_in_adds_a_family(monkeypatch):
    mine = architecture.Architecture(model_types=("my_llama",), covers="mine")
    monkeypatch.setattr(architecture, "_plugged_in", lambda: iter([("mine", mine)]))
    architecture.architectures.cache_clear()
    assert architecture.architecture_of("my_llama") is mine
    architecture.architectures.cache_clear()


def test_a_broken_plug_in_is_named(monkeypatch):
    class Broken:
        name, value = "broken", "nowhere:ARCHITECTURE"

        def load(self):
            raise ImportError("no module named nowhere")

    monkeypatch.setattr(architecture, "entry_points", lambda group: [Broken()])
    architecture.architectures.cache_clear()
    with pytest.raises(ModelError, match="entry point broken = nowhere:ARCHITECTURE"):
        architecture.architectures()
    architecture.architectures.cache_clear()


def test_a_model_of_sliding_layers_alone_is_refused_with_a_way_out_that_works(build, policies, prompt, tmp_path):
    model = build("mistral", sliding_window=8)
    error = str(refusal(model, policies["window"]))
    assert "all 3 layers of this mistral model attend to the last 8 tokens only" in error
    assert "sliding_window=None" in error
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, sliding_window=None)
    assert apply(again, policies["window"]).generate(prompt, do_sample=False, max_new_tokens=4).shape == (2, 21)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_layers_are_left_alone(build, family, policies, prompt):
    model = build(family, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    apply(model, policies["window"])
    cache = kvpolicy.cache_for(model, prompt=(11, 17), max_new_tokens=4, batch=2)
    assert [layer.window for layer in cache.layers] == [None, None, 8] and len(cache.governed) == 2
    assert model.generate(prompt, do_sample=False, max_new_tokens=4).shape == (2, 21)


def test_an_offloaded_model_is_refused(build, policies):
    model = build()
    model.model.layers[1].to("meta")
    assert "offloaded" in str(refusal(model, policies["window"]))
    mapped = build()
    mapped.hf_device_map = {"model.layers.0": 0, "model.layers.1": "disk"}
    assert "on GPUs alone" in str(refusal(mapped, policies["window"]))
    whole = build()
    whole.hf_device_map = {"": "cpu"}
    apply(whole, policies["window"])


def test_only_a_transformers_model_is_taken(build, policies):
    with pytest.raises(UsageError, match="not a Linear"):
        apply(torch.nn.Linear(2, 2), policies["window"])
    with pytest.raises(UsageError, match="pass the model it wraps"):
        apply(torch.compile(build()), policies["window"])


def test_a_decoder_that_is_built_otherwise_is_refused(build, policies):
    model = build()
    model.model.layers = torch.nn.ModuleList(list(model.model.layers)[:2])
    assert "says it has 3 decoder layers, and 2 were found" in str(refusal(model, policies["window"]))
    model = build()
    for layer in model.model.layers:
        layer.self_attn = torch.nn.Identity()
    assert "do not pass keywords on" in str(refusal(model, policies["window"]))


def test_a_policy_the_runtime_cannot_run_is_refused_by_name_before_any_change(build, policies):
    from kvpolicy.language import loads_policy

    pools = "{all: {admit: all, budget: 64, evict: {scope: across-heads}}}"
    policy = loads_policy(f"kvpolicy: 1\nname: shared\npools: {pools}\n")
    model = build()
    assert "across-heads while generating" in str(refusal(model, policy))
    assert "_kvpolicy" not in model.__dict__
