"""Later turns, chunked prompts and interleaved conversations take the same path as a first prompt, and do not meet."""

import pytest
import torch
from transformers import DynamicCache

from kvpolicy import CacheError
from kvpolicy.patching import apply, cache_for

NAMES = ["everything", "window", "scored", "paged"]


def replay(model, cache, passes):
    """Feed passes of (ids, kind) by hand, positions counted by column; the last logits of each."""
    outputs, seen = [], 0
    with torch.no_grad():
        for ids in passes:
            position = torch.arange(seen, seen + ids.shape[1])[None]
            outputs.append(model(ids, past_key_values=cache, position_ids=position).logits[:, -1])
            seen += ids.shape[1]
    return outputs


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("name", NAMES)
def test_a_chunked_prompt_is_one_turn(build, family, policies, padded, greedy, name, chunk):
    model = build(family)
    try:
        model.generate(**padded, prefill_chunk_size=chunk, **greedy)
    except RuntimeError as error:
        if family != "qwen2_5_vl":  # which cannot before transformers 5.18
            raise
        pytest.skip(f"nor can transformers without a policy: {error}")
    apply(model, policies[name])
    whole = model.generate(**padded, return_dict_in_generate=True, output_logits=True, **greedy)
    chunked = model.generate(
        **padded, prefill_chunk_size=chunk, return_dict_in_generate=True, output_logits=True, **greedy
    )
    assert torch.equal(chunked.sequences, whole.sequences)
    assert torch.equal(
        chunked.past_key_values.positions(0).sort(-1).values, whole.past_key_values.positions(0).sort(-1).values
    )
    torch.testing.assert_close(torch.stack(chunked.logits), torch.stack(whole.logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["all ids", "new ids", "embeddings"])
@pytest.mark.parametrize("name", NAMES)
def test_a_later_turn_equals_the_same_passes_by_hand(model, policies, prompt, greedy, name, form):
    apply(model, policies[name])
    first = model.generate(prompt, return_dict_in_generate=True, **greedy)
    cache, words = first.past_key_values, torch.full((2, 9), 7)
    text = torch.cat([first.sequences, words], 1)
    inputs = {
        "all ids": {"input_ids": text},
        "new ids": {"input_ids": text[:, cache.get_seq_length() :]},
        "embeddings": {"inputs_embeds": model.get_input_embeddings()(text)},
    }[form]
    second = model.generate(
        **inputs,
        attention_mask=torch.ones_like(text),
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **greedy,
    )
    assert second.past_key_values is cache
    new = second.sequences[:, -24:]
    assert cache.get_seq_length() == text.shape[1] + 23

    by_hand = cache_for(model, prompt=17 + 10, max_new_tokens=48, batch=2, turns=2)
    one_by_one = [column[:, None] for column in first.sequences[:, 17:-1].T]
    passes = [prompt, *one_by_one, text[:, 40:], *(column[:, None] for column in new[:, :-1].T)]
    expected = replay(model, by_hand, passes)[-24:]
    torch.testing.assert_close(torch.stack(second.logits), torch.stack(expected), rtol=0, atol=1e-4)
    assert torch.equal(cache.positions(1).sort(-1).values[..., -12:], by_hand.positions(1).sort(-1).values[..., -12:])


def test_a_later_turn_of_a_padded_batch_equals_its_rows_alone(build, family, policies, padded, greedy):
    model = apply(build(family), policies["scored"])
    ids, mask = padded["input_ids"], padded["attention_mask"]

    def two_turns(ids, mask):
        first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **greedy)
        more = torch.full((len(ids), 9), 7)
        text = torch.cat([first.sequences, more], 1)
        mask = torch.cat([mask, torch.ones(len(ids), 24 + 9, dtype=mask.dtype)], 1)
        return model.generate(text, attention_mask=mask, past_key_values=first.past_key_values, **greedy)[:, -24:]

    both = two_turns(ids, mask)
    assert torch.equal(both[:1], two_turns(ids[:1], mask[:1]))
    assert torch.equal(both[1:], two_turns(ids[1:, 6:], mask[1:, 6:]))


@pytest.mark.parametrize("name", NAMES)
def test_generating_on_equals_generating_at_once(model, policies, padded, name):
    apply(model, policies[name])
    settings = {"do_sample": False, "return_dict_in_generate": True}
    at_once = model.generate(**padded, max_new_tokens=24, **settings)
    first = model.generate(**padded, max_new_tokens=10, **settings)
    mask = torch.cat([padded["attention_mask"], torch.ones(2, 10, dtype=torch.long)], 1)
    second = model.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=14, **settings
    )
    assert torch.equal(second.sequences, at_once.sequences)


def test_a_turn_that_was_planned_for_moves_no_memory(model, policies, prompt, greedy):
    apply(model, policies["window"])
    cache = cache_for(model, prompt=(0, 60), max_new_tokens=60, batch=2, turns=2)
    plan = cache.plan
    first = model.generate(prompt, past_key_values=cache, **greedy)
    model.generate(torch.cat([first, prompt], 1), past_key_values=cache, **greedy)
    assert cache.plan is plan
    assert cache.passes["prompt"] == 2


def test_a_cache_that_has_seen_more_than_the_input(model, policies, prompt, greedy):
    apply(model, policies["window"])
    cache = model.generate(prompt, return_dict_in_generate=True, **greedy).past_key_values
    with pytest.raises(CacheError, match=r"already seen 40 columns.*covers 17"):
        model.generate(prompt, past_key_values=cache, **greedy)


@pytest.mark.parametrize("name", NAMES)
def test_interleaved_conversations_do_not_meet(model, policies, prompt, name):
    apply(model, policies[name])
    other = prompt.flip(0, 1)[:, :13]
    lines = [[each, *(each[:, i : i + 1] for i in range(12))] for each in (prompt, other)]

    def fresh(line):
        return cache_for(model, prompt=line[0].shape[1], max_new_tokens=12, batch=2)

    alone = [replay(model, fresh(line), line) for line in lines]
    caches, together = [fresh(line) for line in lines], [[], []]
    dense = DynamicCache()
    with torch.no_grad():
        for step in range(13):
            model(prompt[:, :3], past_key_values=dense)  # a conversation without a policy, in between
            for which in (0, 1):
                ids = lines[which][step]
                seen = caches[which].get_seq_length()
                position = torch.arange(seen, seen + ids.shape[1])[None]
                logits = model(ids, past_key_values=caches[which], position_ids=position).logits
                together[which].append(logits[:, -1])
    for mine, theirs in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_cache_used_again_after_reset(model, policies, prompt, greedy):
    apply(model, policies["paged"])
    cache = cache_for(model, prompt=17, max_new_tokens=24, batch=2)
    first = model.generate(prompt, past_key_values=cache, **greedy)
    cache.reset()
    assert torch.equal(model.generate(prompt, past_key_values=cache, **greedy), first)
