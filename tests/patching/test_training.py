"""Training a patched model is training the model; a policy's cache takes no part in it."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from kvpolicy import CacheError, ModelError
from kvpolicy.patching import apply, cache_for


def gradients(model, prompt, **inputs):
    """Loss and gradients of one step in training mode, from one seed."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(prompt, labels=prompt, **inputs).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def checkpointed(model, kind):
    if kind is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})
    if kind == "reentrant":
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize(("kind", "compile"), [(None, None), ("saved", None), ("reentrant", "eager")])
def test_losses_and_gradients_are_those_of_the_unpatched_model(build, policies, padded, kind, compile):
    ids, mask = padded["input_ids"], padded["attention_mask"]
    model = checkpointed(build(attention_dropout=0.1), kind)
    inputs = ({}, {"use_cache": False}, {"attention_mask": mask})
    expected = [gradients(model, ids, **each) for each in inputs]
    apply(model, policies["window"], compile=compile)
    for each, before in zip(inputs, expected, strict=True):
        assert all(map(torch.equal, gradients(model, ids, **each), before))
    # And between two steps it may write under its policy.
    output = model.eval().generate(**padded, do_sample=False, max_new_tokens=8, return_dict_in_generate=True)
    assert output.past_key_values.stats()["evicted"] > 0
    assert all(map(torch.equal, gradients(model, ids), expected[0]))


def test_a_trainer_takes_the_same_steps(build, policies, prompt, tmp_path):
    def trained(model):
        data = [{"input_ids": row, "labels": row} for row in prompt]
        settings = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "gradient_checkpointing": True}
        quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
        Trainer(model, TrainingArguments(str(tmp_path), **settings, **quiet), train_dataset=data).train()
        return model.state_dict()

    expected, found = trained(build()), trained(apply(build(), policies["scored"]))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_policys_cache_is_no_place_for_gradients(model, policies, prompt):
    cache = cache_for(apply(model, policies["scored"]), prompt=17, max_new_tokens=4, batch=2)
    with pytest.raises(CacheError, match=r"carries no gradients; run the model under torch\.no_grad"):
        model.train()(prompt, past_key_values=cache, labels=prompt)


def test_what_only_training_does_is_refused_over_a_policys_cache(build, policies, prompt, greedy):
    dropping = apply(build(attention_dropout=0.5), policies["scored"]).train()
    with pytest.raises(ModelError, match=r"drops attention at random \(dropout 0\.5\).*model\.eval"):
        dropping.generate(prompt, **greedy)
    plain = apply(build(), policies["scored"])
    expected = plain.generate(prompt, **greedy)
    assert torch.equal(plain.train().generate(prompt, **greedy), expected)  # where training changes nothing
    plain.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match=r"without a cache while the model trains.*gradient_checkpointing_disable"):
        plain.generate(prompt, **greedy)
    plain.gradient_checkpointing_disable()
    assert torch.equal(plain.generate(prompt, **greedy), expected)
