"""Layers that keep a state in place of tokens: left alone under a policy, and carried along with its cache."""

import pytest
import torch

import kvpolicy
from kvpolicy import CacheError, ModelError
from kvpolicy.plan import ModelGeometry
from kvpolicy.testing.models import random_model
from tests.patches.kit import MODEL_TYPES, build

SIZES = {"heavy": 5, "recent": 4}


def stateful(model_type):
    from kvpolicy.testing.models import OWN

    return set(OWN.get(model_type, {}).get("kinds", ())) & {"linear_attention", "conv"} or model_type == "jamba"


STATEFUL = [model_type for model_type in MODEL_TYPES if stateful(model_type)]


def drawn(rows, tokens, seed=0):
    return torch.randint(2, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def test_a_config_tells_which_layers_keep_a_state():
    shape = ModelGeometry.from_config(random_model("qwen3_next", num_hidden_layers=5).config)
    assert (shape.states, shape.governed, shape.layers, shape.depth) == ((0, 2, 4), (1, 3), 2, 5)
    raw = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "model_type": "new"}
    old = ModelGeometry.from_config({**raw, "layer_types": ["mamba", "attention"]})
    assert (old.states, old.governed) == ((0,), (1,))
    with pytest.raises(ModelError, match="no layer of this new model keeps tokens"):
        ModelGeometry.from_config({**raw, "layer_types": ["mamba", "mamba"]})


@pytest.mark.parametrize("model_type", STATEFUL)
def test_a_padded_row_is_what_it_is_alone(model_type):
    """And so is every row of later calls: a cache that is used again forgets its states."""
    model = kvpolicy.apply(build(model_type), "h2o", **SIZES)
    ids, mask = drawn(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[1, :6] = 0
    greedy = {"do_sample": False, "max_new_tokens": 12}
    both = model.generate(ids * mask, attention_mask=mask, **greedy)
    assert torch.equal(model.generate(ids * mask, attention_mask=mask, **greedy), both)
    for row, start in ((0, 0), (1, 6)):
        alone = model.generate(ids[row : row + 1, start:], **greedy)
        assert torch.equal(alone[0, -12:], both[row, -12:])


def test_a_fork_carries_the_states_and_goes_its_own_way():
    model = kvpolicy.apply(build("qwen3_next"), "h2o", **SIZES)
    with torch.no_grad():
        cache = kvpolicy.cache_for(model, prompt=13, max_new_tokens=12)
        model(drawn(1, 13), past_key_values=cache)
        forks = [cache.copy(), cache.copy(repeats=2)]
        tokens = drawn(1, 12, seed=1)
        straight = [model(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(12)]
        for fork in forks:
            rows = fork.plan.batch
            for at in range(12):
                logits = model(tokens[:, at : at + 1].expand(rows, 1), past_key_values=fork).logits
                torch.testing.assert_close(logits, straight[at].expand_as(logits), rtol=1e-4, atol=1e-4)


def test_beams_take_their_states_along():
    model, ids = build("lfm2"), drawn(2, 9)
    given = {"do_sample": False, "num_beams": 3, "max_new_tokens": 10}
    expected = model.generate(ids, **given)
    kvpolicy.apply(model, "h2o", heavy=50, recent=50)
    assert torch.equal(model.generate(ids, **given), expected)


def test_turns_go_on_from_the_states():
    model, ids = build("granitemoehybrid"), drawn(1, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
        kvpolicy.apply(model, "h2o", heavy=50, recent=50)
        cache = kvpolicy.cache_for(model, prompt=35, max_new_tokens=5, turns=2)
        for first, end in [(0, 15), *((at, at + 1) for at in range(15, 20)), (20, 40)]:
            logits = model(ids[:, first:end], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_what_the_states_cannot_do_is_refused(tmp_path):
    model = kvpolicy.apply(build("qwen3_next"), "h2o", **SIZES)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, -3:] = 0
    with pytest.raises(CacheError, match="a prompt that ends in padding would change it; pad on the left"):
        model.generate(drawn(2, 9), attention_mask=mask, max_new_tokens=4)
    cache = kvpolicy.cache_for(model, prompt=9, max_new_tokens=4)
    with torch.no_grad():
        model(drawn(1, 9), past_key_values=cache)
    with pytest.raises(CacheError, match=r"no file holds those yet; fork the cache with cache\.copy\(\)"):
        cache.save(tmp_path / "cache.safetensors")


def test_only_layers_with_tokens_are_compiled():
    torch._dynamo.reset()
    model, ids = build("qwen3_next"), drawn(1, 11)
    greedy = {"do_sample": False, "max_new_tokens": 8}
    with kvpolicy.applied(model, "h2o", **SIZES):
        expected = model.generate(ids, **greedy)
    kvpolicy.apply(model, "h2o", compile="eager", **SIZES)
    assert torch.equal(model.generate(ids, **greedy), expected)
    assert kvpolicy.compile_report(model) == kvpolicy.compile_report(model).__class__(graphs=1)
    assert "forward" not in vars(model.model.layers[0]) and "forward" in vars(model.model.layers[1])
