"""Layers that attend to the text nearby: no policy touches them, whatever it does to the others."""

import pytest
import torch

import kvpolicy
from kvpolicy.errors import CacheError, ModelError
from kvpolicy.plan import LocalLayer, ModelGeometry, make_plan
from kvpolicy.testing.live import LiveAgreement
from kvpolicy.testing.models import OWN, random_model

NEAR = [model_type for model_type, own in OWN.items() if "kinds" in own]
SIZES = {"heavy": 5, "recent": 4}


def drawn(rows, tokens, seed=0):
    return torch.randint(2, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def test_a_config_tells_which_layers_are_local():
    shape = ModelGeometry.from_config(random_model("gemma2", num_hidden_layers=5).config)
    assert shape.local == tuple(LocalLayer(index, "sliding_attention", 8) for index in (0, 2, 4))
    assert (shape.layers, shape.depth, shape.governed) == (2, 5, (1, 3))
    assert ModelGeometry.from_config(random_model("llama").config).local == ()


def test_a_window_that_is_switched_off_is_none():
    raw = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 16, "model_type": "qwen2"}
    assert not ModelGeometry.from_config({**raw, "sliding_window": 32, "use_sliding_window": False}).local
    with pytest.raises(ModelError, match="all 4 layers of this qwen2 model attend to the last 32 tokens only"):
        ModelGeometry.from_config({**raw, "sliding_window": 32})


def test_a_kind_of_layer_that_nobody_knows_is_named():
    raw = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "model_type": "new"}
    with pytest.raises(ModelError, match="layer 1 of this new model is of kind moon_attention"):
        ModelGeometry.from_config({**raw, "layer_types": ["full_attention", "moon_attention"]})
    with pytest.raises(ModelError, match="its config gives no sliding_window"):
        ModelGeometry.from_config({**raw, "layer_types": ["full_attention", "sliding_attention"]})


@pytest.mark.parametrize("model_type", NEAR)
def test_turns_and_rows_keep_to_the_unpatched_model_and_the_plan(model_type):
    """Two turns with generated tokens between, of rows that differ, against each row alone and unpatched."""
    model, lengths = random_model(model_type), (13, 9)
    text = drawn(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, : lengths[0] - lengths[1]] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    rows = [row[kept.bool()][None] for row, kept in zip(text, mask, strict=True)]
    with torch.no_grad():
        expected = [model(row, use_cache=False).logits[0, -1] for row in rows]
        with kvpolicy.applied(model, "dense"):
            cache = kvpolicy.cache_for(model, prompt=(9, 22), max_new_tokens=18, batch=2, turns=2)
            assert cache.bytes == cache.plan.bytes
            parts = [
                (0, 13),
                *((at, at + 1) for at in range(13, 25)),
                (25, 34),
                *((at, at + 1) for at in range(34, 40)),
            ]
            for first, end in parts:
                given = {"attention_mask": mask[:, :end], "position_ids": places[:, first:end]}
                logits = model(text[:, first:end], past_key_values=cache, **given).logits[:, -1]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_ring_grows_with_the_plan():
    """A cache that is extended keeps what is near, in a ring of another length."""
    model = kvpolicy.apply(random_model("gemma2", sliding_window=16), "dense")
    cache = kvpolicy.cache_for(model, prompt=6, max_new_tokens=3)
    assert [layer.plan.slots for layer in cache.local] == [9, 9]
    text = drawn(1, 30)
    with torch.no_grad():
        model(text[:, :6], past_key_values=cache)
        for at in range(6, 9):
            model(text[:, at : at + 1], past_key_values=cache)
        cache.extend(max_new_tokens=24)
        assert [layer.plan.slots for layer in cache.local] == [16, 16]
        for at in range(9, 30):
            logits = model(text[:, at : at + 1], past_key_values=cache).logits[:, -1]
        kvpolicy.remove(model)
        torch.testing.assert_close(logits, model(text).logits[:, -1], rtol=1e-4, atol=1e-4)


SMALL = {
    "snapkv": {"budget": 12, "window": 4},
    "ada-kv": {"budget": 12, "window": 4},
    "tova": {"budget": 12},
    "keyformer": {"budget": 12, "recent": 4},
    "quest": {},
}


@pytest.mark.parametrize("policy", SMALL)
@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_scores_go_by_the_models_own_logits(model_type, policy):
    """Capped, and beside sinks: what the oracle makes of them is what is kept."""
    model = kvpolicy.apply(random_model(model_type), policy, **SMALL[policy])
    live = LiveAgreement(model, prompt=(14, 18), max_new_tokens=10, batch=2)
    text, mask = drawn(2, 28), torch.ones(2, 28, dtype=torch.long)
    mask[1, :4] = 0
    live.feed(text[:, :18], mask[:, :18])
    for at in range(18, 28):
        live.feed(text[:, at : at + 1], mask[:, : at + 1])
    assert live.agreement.compared == 2 * 2 * 11 and len(live.agreement.near_ties) <= 1
    assert policy == "quest" or live.cache.stats()["evicted"] > 0


def test_llama_4_tempers_by_the_place_in_the_text():
    """Its layers without rotation scale their queries by the position, which their own code reads off a cache."""
    model = random_model("llama4_text", floor_scale=4)
    text = drawn(1, 30)
    with torch.no_grad():
        expected = model(text, use_cache=False).logits[:, -1]
        with kvpolicy.applied(model, "dense"):
            cache = kvpolicy.cache_for(model, prompt=20, max_new_tokens=10)
            model(text[:, :20], past_key_values=cache)
            for at in range(20, 30):
                logits = model(text[:, at : at + 1], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_window_that_the_config_does_not_tell_is_refused():
    model = random_model("gemma2")
    kvpolicy.apply(model, "dense")
    model.model.layers[1].self_attn.sliding_window = 4
    with pytest.raises(ModelError, match="attends through a window of 4 tokens, and its cache was planned for all"):
        model.generate(drawn(1, 5), max_new_tokens=2, do_sample=False)


def test_kernels_of_plain_softmax_never_stand_in_for_more():
    """Where nothing but the call of attention tells of sinks, it is the call that refuses."""
    model = kvpolicy.apply(random_model("gpt_oss"), "dense")
    cache = kvpolicy.cache_for(model, prompt=5, max_new_tokens=2)
    cache.governed[0].backend = "triton"
    with torch.no_grad(), pytest.raises(ModelError, match="the triton kernels compute plain softmax"):
        model(drawn(1, 5), past_key_values=cache)


def test_what_local_layers_take_is_in_the_plan():
    shape = ModelGeometry.from_config(random_model("gemma2").config)
    plan = make_plan(kvpolicy.load_policy("h2o", set=SIZES), shape, prompt=40, max_new_tokens=40)
    numbers = 2 * shape.kv_heads * 8 * shape.head_dim * 4 + 8 * 4
    assert (
        plan.local_bytes
        == 2 * numbers
        == plan.bytes - sum(layer.bytes for layer in plan.layers) - sum(buffer.bytes for buffer in plan.clocks)
    )
    assert plan.dense_bytes == 2 * (80 + 2 * 8) * shape.kv_heads * shape.head_dim * 4


def test_images_that_see_ahead_are_refused():
    """The tokens of an image attend to one another in both directions in Gemma 3; text goes as ever."""
    model = kvpolicy.apply(random_model("gemma3"), "h2o", **SIZES)
    assert model.generate(drawn(1, 12), max_new_tokens=4, do_sample=False).shape == (1, 16)
    ids = torch.tensor([[2, 95, 94, 94, 94, 94, 96, 5]])
    picture = torch.randn(1, 3, 8, 8)
    for seen in ({"pixel_values": picture}, {"token_type_ids": (ids == 94).long()}, {}):
        with pytest.raises(CacheError, match="see one another in both directions in Gemma3Model"):
            model.generate(ids, max_new_tokens=2, do_sample=False, **seen)
    kvpolicy.remove(model)
    assert model.generate(ids, pixel_values=picture, max_new_tokens=2, do_sample=False).shape == (1, 10)
