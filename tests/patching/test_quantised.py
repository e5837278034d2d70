"""Models whose weights are stored in few bits: the cache keeps what the model computes in."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from kvpolicy.patching import apply, remove


def says_the_same(model, policies, padded, greedy):
    """With room for everything, what the model says; with less, eager and compiled alike."""
    expected = model.generate(**padded, **greedy)
    apply(model, policies["everything"])
    assert torch.equal(model.generate(**padded, **greedy), expected)
    remove(model)
    texts = []
    for compile in (None, "eager"):
        apply(model, policies["scored"], compile=compile)
        output = model.generate(**padded, return_dict_in_generate=True, **greedy)
        assert output.past_key_values.stats()["evicted"] > 0
        texts.append(output.sequences)
        remove(model)
    assert torch.equal(*texts)
    assert torch.equal(model.generate(**padded, **greedy), expected)


def test_torchao_in_place_before_and_after(build, policies, padded, greedy):
    torchao = pytest.importorskip("torchao.quantization")
    model = build()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    expected = model.generate(**padded, **greedy)
    says_the_same(model, policies, padded, greedy)
    later = apply(build(), policies["everything"], compile="eager")
    assert not torch.equal(later.generate(**padded, **greedy), expected)
    torchao.quantize_(later, torchao.Int8WeightOnlyConfig())  # other weights: other graphs, and no complaint
    assert torch.equal(later.generate(**padded, **greedy), expected)


def test_torchao_as_transformers_loads_it(build, policies, padded, greedy, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    build().save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    says_the_same(model, policies, padded, greedy)


@pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["8", "4"])
def test_bitsandbytes(build, policies, padded, greedy, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    build(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**bits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    says_the_same(model, policies, padded, greedy)
