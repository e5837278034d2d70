"""`generate` builds the right cache by itself, in every mode it has, and a budgetless policy is the full cache."""

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvpolicy import CacheError, ModelError, PolicyCache, UsageError
from kvpolicy.patching import applied, apply, cache_for, remove

CLOSE = {"rtol": 0.0, "atol": 1e-5}


class Collect(BaseStreamer):
    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, value):
        self.chunks.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_budgetless_policy_gives_the_models_own_logits(build, family, implementation, policies, padded):
    model = build(family, attn_implementation=implementation)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    steps = torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def run(cache):
        position = (mask.cumsum(1) - 1).clamp(min=0)
        seen, outputs = mask, []
        outputs.append(model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits)
        for step in steps.T[..., None]:
            seen = torch.cat([seen, torch.ones_like(step)], 1)
            position = position[:, -1:] + 1
            outputs.append(model(step, attention_mask=seen, position_ids=position, past_key_values=cache).logits)
        return outputs

    expected = run(DynamicCache())
    apply(model, policies["everything"])
    ours = run(cache_for(model, prompt=(11, 17), max_new_tokens=12, batch=2))
    valid = mask.bool()
    torch.testing.assert_close(ours[0][valid], expected[0][valid], **CLOSE)
    for now, before in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(now, before, **CLOSE)


def test_generate_under_a_budgetless_policy_says_the_same(build, family, policies, padded, greedy):
    model = build(family)
    expected = model.generate(**padded, **greedy)
    with applied(model, policies["everything"]):
        assert torch.equal(model.generate(**padded, **greedy), expected)


@pytest.mark.parametrize("name", ["window", "scored", "paged"])
def test_the_cache_stays_within_the_plan(model, policies, padded, greedy, name):
    apply(model, policies[name])
    output = model.generate(**padded, return_dict_in_generate=True, **greedy)
    cache = output.past_key_values
    assert isinstance(cache, PolicyCache)
    assert cache.get_seq_length() == 17 + 23
    assert cache.plan.prompt == (11, 17)
    assert cache.plan.max_new_tokens == 24
    stats = cache.stats()
    assert stats["evicted"] > 0
    assert stats["resident"] <= cache.plan.layers[0].slots < 17 + 23
    assert stats["bytes"] == cache.plan.bytes


@pytest.mark.parametrize("name", ["window", "scored", "paged"])
def test_a_padded_row_equals_the_row_alone(build, family, policies, padded, greedy, name):
    model = apply(build(family), policies[name])
    both = model.generate(**padded, **greedy)
    alone = model.generate(padded["input_ids"][1:, 6:], **greedy)
    assert torch.equal(both[1, 6:], alone[0])


def test_sampling_draws_what_the_seed_says(model, policies, padded):
    apply(model, policies["scored"])
    settings = {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": 20}
    torch.manual_seed(7)
    first = model.generate(**padded, **settings)
    torch.manual_seed(7)
    assert torch.equal(model.generate(**padded, **settings), first)


def test_several_sequences_of_one_prompt_are_rows_of_one_cache(model, policies, padded):
    apply(model, policies["scored"])
    output = model.generate(
        **padded, do_sample=True, num_return_sequences=3, max_new_tokens=10, return_dict_in_generate=True
    )
    assert output.sequences.shape == (6, 27)
    assert output.past_key_values.plan.batch == 6


@pytest.mark.parametrize("name", ["everything", "scored", "paged"])
def test_beams_reorder_every_state_of_the_cache(build, family, policies, padded, name):
    """Beams that end on one row must have been fed that row's history: replaying it gives the same scores."""
    model = build(family)
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 16}
    expected = model.generate(**padded, **settings)
    apply(model, policies[name])
    output = model.generate(**padded, return_dict_in_generate=True, output_scores=True, **settings)
    if name == "everything":
        assert torch.equal(output.sequences, expected)
    best = output.sequences
    cache = cache_for(model, prompt=(11, 17), max_new_tokens=16, batch=2)
    mask, total = padded["attention_mask"], torch.zeros(2)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(padded["input_ids"], attention_mask=mask, position_ids=position, past_key_values=cache).logits[
            :, -1
        ]
        for column in best[:, 17:].T:
            total += logits.log_softmax(-1).gather(1, column[:, None])[:, 0]
            position = position[:, -1:] + 1
            logits = model(column[:, None], position_ids=position, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(total / 16, output.sequences_scores, rtol=0, atol=1e-4)


def test_streaming_hands_out_every_token(model, policies, prompt, greedy):
    apply(model, policies["window"])
    streamer = Collect()
    output = model.generate(prompt[:1], streamer=streamer, **greedy)
    assert streamer.ended
    assert streamer.chunks[0] == prompt[:1].tolist()
    assert [token for (token,) in streamer.chunks[1:]] == output[0, 17:].tolist()


@pytest.mark.parametrize("name", ["everything", "scored"])
def test_embeddings_in_place_of_ids(build, family, policies, padded, greedy, name):
    model = apply(build(family), policies[name])
    expected = model.generate(**padded, **greedy)
    embeddings = model.get_input_embeddings()(padded["input_ids"])
    output = model.generate(
        inputs_embeds=embeddings, attention_mask=padded["attention_mask"], return_dict_in_generate=True, **greedy
    )
    assert torch.equal(output.sequences, expected[:, 17:])
    assert output.past_key_values.plan.max_new_tokens == 24


def test_max_length_and_the_default_length(model, policies, prompt):
    apply(model, policies["window"])
    output = model.generate(prompt, do_sample=False, max_length=30, return_dict_in_generate=True)
    assert output.sequences.shape == (2, 30)
    assert output.past_key_values.plan.max_new_tokens == 13
    assert model.generate(prompt, do_sample=False).shape == (2, 37)


def test_the_end_of_a_text(model, policies, padded, greedy):
    """A row that ended is padded; the others go on as if alone."""
    apply(model, policies["scored"])
    free = model.generate(**padded, **greedy)
    end = free[0, 17 + 8].item()
    output = model.generate(**padded, eos_token_id=end, **greedy)
    first = (free[0, 17:] == end).nonzero()[0].item()
    assert output[0, 17 : 17 + first + 1].tolist() == free[0, 17 : 17 + first + 1].tolist()
    assert not output[0, 17 + first + 1 :].any()


def test_without_generate(model, policies, prompt):
    """A plain call with a cache of ours; positions left out are counted from what the cache has seen."""
    apply(model, policies["window"])
    explicit, counted, by_place = (cache_for(model, prompt=17, max_new_tokens=4, batch=2) for _ in range(3))
    position = torch.arange(17)[None]
    with torch.no_grad():
        for ids in (prompt, prompt[:, 3:4], prompt[:, 5:6]):
            expected = model(ids, past_key_values=explicit, position_ids=position).logits
            assert torch.equal(model(ids, past_key_values=counted).logits, expected)
            hidden = model.model(ids, None, None, by_place).last_hidden_state
            assert torch.equal(model.lm_head(hidden), expected)
            position = position[:, -1:] + 1
    assert counted.get_seq_length() == 19


class Int8Linear(torch.nn.Module):
    """A linear layer as quantisers make them: integer weights, scales beside them."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, hidden):
        return hidden @ (self.weight * self.scale).T


def test_a_quantised_model(model, policies, prompt, greedy):
    for layer in model.model.layers:
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
        layer.self_attn.q_proj = Int8Linear(layer.self_attn.q_proj)
    expected = model.generate(prompt, **greedy)
    with applied(model, policies["everything"]):
        assert torch.equal(model.generate(prompt, **greedy), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_afterwards(model, policies, prompt, greedy, dtype):
    apply(model, policies["scored"])
    model.to(dtype)
    output = model.generate(prompt, return_dict_in_generate=True, output_logits=True, **greedy)
    assert output.past_key_values.layers[0].state.keys.dtype == dtype
    assert all(step.isfinite().all() for step in output.logits)


def test_inference_mode_and_afterwards(model, policies, prompt, greedy):
    apply(model, policies["window"])
    with torch.inference_mode():
        output = model.generate(prompt, return_dict_in_generate=True, **greedy)
    cache, text = output.past_key_values, output.sequences.clone()
    for inside in (True, False):
        text = torch.cat([text, prompt], 1)
        with torch.inference_mode(inside):
            text = model.generate(text, past_key_values=cache, **greedy).clone()
    assert text.shape == (2, 3 * (17 + 24))


def refused(error, match):
    return pytest.raises(error, match=match)


def test_what_generate_cannot_do_under_a_policy(build, model, policies, prompt, greedy):
    apply(model, policies["window"])
    with refused(UsageError, "assisted decoding"):
        model.generate(prompt[:1], assistant_model=build(seed=1), **greedy)
    with refused(UsageError, "prompt_lookup_num_tokens"):
        model.generate(prompt[:1], prompt_lookup_num_tokens=3, **greedy)
    cache = cache_for(model, prompt=17, max_new_tokens=24, batch=2)
    with refused(UsageError, "use_cache=False"):
        model.generate(prompt, past_key_values=cache, use_cache=False, **greedy)
    with refused(CacheError, "made for 2 rows, and generate runs 1"):
        model.generate(prompt[:1], past_key_values=cache, **greedy)
    with refused(ValueError, "cache_implementation"):
        model.generate(prompt, past_key_values=cache, cache_implementation="static", **greedy)
    with refused(CacheError, "cropped"):
        cache.crop(1)


def test_a_patched_model_as_assistant(build, model, policies, prompt, greedy):
    """Recent versions of transformers ask it for a cache, which is refused; others bring one of their own."""
    main, assistant = build(seed=1), apply(model, policies["window"])
    expected = main.generate(prompt[:1], **greedy)
    try:
        output = main.generate(prompt[:1], assistant_model=assistant, **greedy)
    except UsageError as error:
        assert "assisted decoding" in str(error)
    else:
        assert torch.equal(output, expected)


def test_assisted_decoding_works_once_the_policy_is_off(build, model, policies, prompt, greedy):
    expected = model.generate(prompt[:1], **greedy)
    remove(apply(model, policies["window"]))
    assert torch.equal(model.generate(prompt[:1], assistant_model=build(seed=1), **greedy), expected)


def test_what_a_plain_call_cannot_do(model, policies, prompt, build):
    cache = cache_for(apply(model, policies["window"]), prompt=17, max_new_tokens=4, batch=2)
    with refused(CacheError, "torch.no_grad"):
        model(prompt, past_key_values=cache)
    cache.reset()
    with torch.no_grad():
        with refused(ModelError, "attention maps"):
            model(prompt, past_key_values=cache, output_attentions=True)
        with refused(CacheError, "made for 2 rows and 3 layers"):
            model(prompt[:1], past_key_values=cache)
        with refused(CacheError, "2-D padding mask"):
            model(prompt, past_key_values=cache, attention_mask=torch.ones(2, 1, 17, 17, dtype=torch.bool))
        with refused(CacheError, "2-D padding mask"):
            model(prompt, past_key_values=cache, attention_mask=torch.ones(2, 4))
        other = apply(build(num_hidden_layers=2), policies["window"])
        with refused(CacheError, "3 layers.*the model 2"):
            other(prompt, past_key_values=cache)
        with refused(CacheError, "kvpolicy.apply"):
            build()(prompt, past_key_values=cache)


def test_a_changed_attention_implementation_is_noticed(model, policies, prompt, greedy):
    """set_attn_implementation after apply would bypass the policy without a word."""
    apply(model, policies["window"])
    model.set_attn_implementation("eager")
    with refused(ModelError, "changed to 'eager'"):
        model.generate(prompt, **greedy)
    remove(model)
    assert model.config._attn_implementation == "eager"


def test_a_layer_called_outside_a_pass_says_so(model, policies, prompt):
    """No pass is open after a pass: a call that skips the model's hooks fails instead of running on old clocks."""
    apply(model, policies["window"])
    cache = cache_for(model, prompt=17, max_new_tokens=4, batch=2)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        with refused(CacheError, "not opened"):
            model.model.forward(prompt[:, :1], past_key_values=cache)
