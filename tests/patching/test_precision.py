"""Every floating type, autocast, and models that are cast after they were patched."""

import pytest
import torch

from kvpolicy import CacheError
from kvpolicy.patching import apply, cache_for, remove

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.006}
"""How far logits may be apart, as a share of the largest."""


def told(model, inputs, greedy):
    output = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **greedy)
    return output.sequences, torch.stack(output.logits), output.past_key_values


@pytest.mark.parametrize("dtype", CLOSE)
def test_with_room_for_everything_it_says_the_same(build, policies, padded, greedy, dtype):
    model = build().to(dtype)
    text, logits, _ = told(model, padded, greedy)
    apply(model, policies["everything"])
    ours, found, cache = told(model, padded, greedy)
    assert cache.layers[0].state.keys.dtype == dtype
    same = int((ours == text).all(0).long().cumprod(0).sum()) - padded["input_ids"].shape[1] + 1
    assert same > 8  # random weights make ties that rounding may decide; from there on texts differ
    torch.testing.assert_close(found[:same], logits[:same], rtol=0, atol=CLOSE[dtype] * float(logits.abs().max()))


@pytest.mark.parametrize(("name", "compile"), [("everything", "eager"), ("scored", None), ("paged", None)])
def test_under_autocast(build, policies, padded, greedy, name, compile):
    """Projections then give short floats, and the cache keeps the model's own."""
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        _, expected, _ = told(model, padded, greedy)
        apply(model, policies[name])
        text, logits, cache = told(model, padded, greedy)
        remove(model)
        apply(model, policies[name], compile=compile)
        assert torch.equal(told(model, padded, greedy)[0], text)
    assert cache.layers[0].state.keys.dtype == torch.float32
    torch.testing.assert_close(logits[0], expected[0], rtol=0, atol=0.1)
    assert (name == "everything") != (cache.stats()["evicted"] > 0)


def test_a_cache_of_another_dtype_than_the_model_is_refused(model, policies, prompt, greedy):
    apply(model, policies["scored"])
    cache = cache_for(model, prompt=17, max_new_tokens=24, batch=2)
    model.half()
    with pytest.raises(CacheError, match=r"stores float32, and the model has been cast to float16 since.*cache_for"):
        model.generate(prompt, past_key_values=cache, **greedy)
    assert model.generate(prompt, **greedy).shape == (2, 41)
    model.float()
    assert model.generate(prompt, past_key_values=cache, **greedy).shape == (2, 41)
