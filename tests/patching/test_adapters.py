"""Adapters by peft, on either side of the policy: one that was added, switched, merged or taken off runs under it."""

import pytest
import torch

from kvpolicy import ModelError, UsageError
from kvpolicy.patching import applied, apply, cache_for, compile_report, patch_of, remove

peft = pytest.importorskip("peft")


def lora(seed=1):
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj"]
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)


def adapted(model, config=None):
    """The model in peft's wrapper; with LoRA the same weights each time."""
    return peft.get_peft_model(model, config or lora()).eval()


def test_the_wrapper_is_taken_for_the_model_inside(build, policies, padded, greedy):
    wrapper = adapted(build())
    with torch.no_grad():
        dense = wrapper.generate(**padded, **greedy)
    assert apply(wrapper, policies["everything"]) is wrapper
    assert patch_of(wrapper) is patch_of(wrapper.get_base_model())
    output = wrapper.generate(**padded, return_dict_in_generate=True, **greedy)
    assert torch.equal(output.sequences, dense)
    assert output.past_key_values.plan.policy.name == "everything"
    cache = cache_for(wrapper, prompt=(11, 17), max_new_tokens=24, batch=2)
    assert torch.equal(wrapper.generate(**padded, past_key_values=cache, **greedy), dense)
    assert compile_report(wrapper).graphs == 0
    with pytest.raises(UsageError, match="already"):
        apply(wrapper.get_base_model(), policies["window"])
    remove(wrapper)
    with applied(wrapper, policies["window"]):
        assert not torch.equal(wrapper.generate(**padded, **greedy), dense)
    assert torch.equal(wrapper.generate(**padded, **greedy), dense)


def test_before_or_after_the_policy_is_the_same(build, policies, prompt, greedy, tmp_path):
    after = adapted(apply(build(), policies["scored"]))
    expected = after.generate(input_ids=prompt, **greedy)
    assert torch.equal(apply(adapted(build()), policies["scored"]).generate(input_ids=prompt, **greedy), expected)
    after.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(apply(build(), policies["scored"]), tmp_path).eval()
    assert torch.equal(loaded.generate(input_ids=prompt, **greedy), expected)
    merged = after.merge_and_unload()
    assert torch.equal(merged.generate(prompt, **greedy), expected)
    remove(merged)


def lives(wrapper):
    """An adapter's life, a state at a time."""
    yield "first"
    wrapper.add_adapter("other", lora(seed=2))
    wrapper.eval().set_adapter("other")
    yield "other"
    wrapper.set_adapter("default")
    yield "first again"
    with wrapper.disable_adapter():
        yield "none"
    wrapper.merge_adapter()
    yield "merged"
    wrapper.unmerge_adapter()
    yield "unmerged"


@pytest.mark.slow
def test_compiled_steps_follow_what_becomes_of_an_adapter(build, policies, prompt):
    """A step that was compiled for one state is never run in another, also where only a list notes the change."""
    settings = {"do_sample": False, "max_new_tokens": 8}
    said = {}
    for compile in (None, "eager"):
        wrapper = apply(adapted(build(num_hidden_layers=2)), policies["window"], compile=compile)
        said[compile] = [wrapper.generate(input_ids=prompt, **settings) for _ in lives(wrapper)]
    assert all(map(torch.equal, said[None], said["eager"]))
    first, other, again, none, merged, unmerged = said[None]
    assert torch.equal(first, again) and torch.equal(first, merged) and torch.equal(first, unmerged)
    assert not torch.equal(first, other) and not torch.equal(first, none)
    assert compile_report(wrapper).recompiles == 0


def test_adapters_that_transformers_itself_puts_in(model, policies, prompt, greedy):
    apply(model, policies["scored"])
    before = model.generate(prompt, **greedy)
    model.add_adapter(lora(), "first")
    model.add_adapter(lora(seed=2), "other")
    texts = []
    for name in ("first", "other"):
        model.set_adapter(name)
        texts.append(model.generate(prompt, **greedy))
    assert not torch.equal(*texts)
    model.disable_adapters()
    assert torch.equal(model.generate(prompt, **greedy), before)


def test_training_an_adapter_under_a_policy_is_training_it(build, policies, prompt):
    def gradients(model):
        wrapper = adapted(model).train()
        wrapper.gradient_checkpointing_enable()
        wrapper(input_ids=prompt, labels=prompt).loss.backward()
        return [weight.grad for weight in wrapper.parameters() if weight.requires_grad]

    expected = gradients(build())
    assert len(expected) == 12
    assert all(map(torch.equal, gradients(apply(build(), policies["scored"])), expected))


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("outside", [True, False])
def test_learned_tokens_before_a_prompt_are_planned_for(build, policies, padded, greedy, method, outside):
    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(1)
    dense = adapted(build(), config)
    model = build() if outside else apply(build(), policies["everything"])
    wrapper = adapted(model, config)
    wrapper.load_state_dict(dense.state_dict())
    if outside:
        apply(wrapper, policies["everything"])
    output = wrapper.generate(**padded, return_dict_in_generate=True, **greedy)
    assert torch.equal(output.sequences, dense.generate(**padded, **greedy))
    assert output.past_key_values.plan.prompt == (15, 21)


def test_an_adapter_that_brings_a_cache_is_refused(build, policies, prompt, greedy):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ModelError, match=r"prefix tuning.*keys and values of its own.*LoRA"):
        apply(adapted(build(), config), policies["scored"])
    wrapper = adapted(apply(build(), policies["scored"]), config)
    with pytest.raises(ModelError, match="prefix tuning"):
        wrapper.generate(input_ids=prompt, **greedy)
