"""Phi-3 takes its cache away where a text reaches a certain length: a policy's stays, or the text is refused."""

import pytest
import torch

import kvpolicy
from kvpolicy import UsageError
from kvpolicy.testing.models import random_model

LIMIT = 24
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 3.0, 2.0, 1.0],
    "original_max_position_embeddings": LIMIT,
}


def phi3(**changes):
    sizes = {"original_max_position_embeddings": LIMIT, "max_position_embeddings": 512}
    return random_model("phi3", **{**sizes, **changes})


def ids(length):
    return torch.randint(2, 90, (1, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("prompt", [10, 30])
def test_where_nothing_changes_at_that_length_the_cache_stays(prompt):
    """With room for everything, also logits are those of the model that reads its text anew."""
    model = phi3()
    kvpolicy.apply(model, "h2o", heavy=100, recent=100)
    out = model.generate(ids(prompt), max_new_tokens=20, **GREEDY)
    assert isinstance(out.past_key_values, kvpolicy.PolicyCache)
    kvpolicy.remove(model)
    with torch.no_grad():  # stock `generate` went wrong where it read a text anew, before transformers 5.20
        expected = model(out.sequences[:, :-1], use_cache=False).logits[0, prompt - 1 :]
    torch.testing.assert_close(torch.cat(out.logits), expected, rtol=1e-4, atol=1e-4)
    assert "prepare_inputs_for_generation" not in vars(model)
    kvpolicy.apply(model, "h2o", heavy=4, recent=4)
    assert model.generate(ids(prompt), max_new_tokens=20, **GREEDY).past_key_values.stats()["evicted"] > 0


def test_a_text_that_is_long_from_the_start_has_the_other_frequencies_throughout():
    model = phi3(rope_parameters=LONG)
    expected = model.generate(ids(30), max_new_tokens=20, **GREEDY)
    kvpolicy.apply(model, "h2o", heavy=100, recent=100)
    out = model.generate(ids(30), max_new_tokens=20, **GREEDY)
    assert isinstance(out.past_key_values, kvpolicy.PolicyCache)
    torch.testing.assert_close(torch.cat(out.logits), torch.cat(expected.logits), rtol=1e-4, atol=1e-4)


def test_a_text_that_outgrows_its_frequencies_is_refused():
    model = kvpolicy.apply(phi3(rope_parameters=LONG), "h2o", heavy=4, recent=4)
    model.generate(ids(10), max_new_tokens=14, **GREEDY)
    with pytest.raises(UsageError, match=r"beyond 24 tokens .* begins with 10 .* asks for 25; .* more than 24 tokens"):
        model.generate(ids(10), max_new_tokens=15, **GREEDY)
    cache = kvpolicy.cache_for(model, prompt=40, max_new_tokens=40, turns=2)
    text = model.generate(ids(10), max_new_tokens=4, past_key_values=cache, do_sample=False)
    with pytest.raises(UsageError, match="other frequencies"):
        model.generate(torch.cat([text, ids(12)], 1), max_new_tokens=4, past_key_values=cache, do_sample=False)
