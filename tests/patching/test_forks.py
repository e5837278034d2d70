"""A prompt that was read once: its cache is copied, with as many rows as one likes, or kept on disk."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpolicy import CacheError, UsageError, load_cache
from kvpolicy.patching import apply, cache_for, remove
from tests.invariants.policies import SHAPES, thorough, tight


def read(model, prompt, **kwargs):
    """A cache that has read a prompt and nothing else, with room for another turn."""
    rows, columns = prompt.shape
    cache = cache_for(model, prompt=(columns - 6, columns + 12), max_new_tokens=30, batch=rows, turns=2)
    with torch.no_grad():
        model(prompt, past_key_values=cache, **kwargs)
    return cache


def ask(model, prompt, question, cache, mask=None):
    """Generated tokens of a second turn of six equal tokens, and what was kept."""
    text = torch.cat([prompt, torch.full((len(prompt), 6), question)], 1)
    mask = torch.cat([torch.ones_like(prompt) if mask is None else mask, torch.ones_like(text[:, -6:])], 1)
    new = model.generate(
        text, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=10, pad_token_id=0
    )
    return new[:, text.shape[1] :], [cache.positions(layer).sort(-1).values for layer in range(len(cache.layers))]


def same(one, other):
    return torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize("name", thorough(among=SHAPES))
def test_a_fork_goes_on_as_if_it_had_read_the_prompt_itself(build, padded, name, tmp_path):
    """Copied, deep-copied and from disk; and the cache they come from stays where it was."""
    model = apply(build(), tight(name))
    ids, mask = padded["input_ids"], padded["attention_mask"]
    cache = read(model, ids, attention_mask=mask)
    before = [cache.positions(layer) for layer in range(3)]
    expected = ask(model, ids, 5, read(model, ids, attention_mask=mask), mask)
    cache.save(tmp_path / "prompt.safetensors")
    ask(model, ids, 6, cache.copy(), mask)
    forks = cache.copy(), copy.deepcopy(cache), load_cache(model, tmp_path / "prompt.safetensors")
    assert all(same(ask(model, ids, 5, fork, mask), expected) for fork in forks)
    assert cache.get_seq_length() == 17
    assert all(map(torch.equal, before, (cache.positions(layer) for layer in range(3))))
    assert same(ask(model, ids, 5, cache, mask), expected)


@pytest.mark.parametrize("name", ["scored", "paged"])
def test_many_answers_to_a_prompt_that_was_read_once(model, policies, prompt, greedy, name):
    apply(model, policies[name])
    one = prompt[:1]
    cache = read(model, one)
    alone = {question: ask(model, one, question, cache.copy())[0] for question in (5, 6, 7)}
    questions = torch.tensor([5, 6, 7])[:, None].expand(-1, 6)
    text = torch.cat([one.expand(3, -1), questions], 1)
    together = model.generate(text, past_key_values=cache.copy(repeats=3), do_sample=False, max_new_tokens=10)
    assert torch.equal(together[:, text.shape[1] :], torch.cat(list(alone.values())))
    sampled = model.generate(
        torch.cat([one, torch.full((1, 6), 5)], 1),
        past_key_values=cache.copy(repeats=4),
        do_sample=True,
        num_return_sequences=4,
        max_new_tokens=5,
    )
    assert sampled.shape == (4, 28)
    both = read(model, prompt).copy(repeats=2)
    assert torch.equal(both.positions(0)[0], both.positions(0)[1])
    assert not torch.equal(both.positions(0)[1], both.positions(0)[2]) or name == "paged"


def test_a_cache_that_has_generated_and_grown_is_saved_as_it_is(model, policies, prompt, greedy, tmp_path):
    apply(model, policies["paged"])
    output = model.generate(prompt, return_dict_in_generate=True, **greedy)
    cache, text = output.past_key_values, torch.cat([output.sequences, prompt], 1)
    output = model.generate(text, past_key_values=cache, return_dict_in_generate=True, **greedy)
    cache.save(tmp_path / "cache.safetensors")
    again = load_cache(model, tmp_path / "cache.safetensors")
    assert again.plan == cache.plan
    assert again.stats() == cache.stats()
    text = torch.cat([output.sequences, prompt[:, :5]], 1)
    expected = model.generate(text, past_key_values=cache, **greedy)
    assert torch.equal(model.generate(text, past_key_values=again, **greedy), expected)
    again.reset()
    assert torch.equal(model.generate(prompt, past_key_values=again, **greedy), model.generate(prompt, **greedy))


def test_compiled_steps_go_on_from_a_fork(build, policies, prompt, tmp_path):
    model = apply(build(num_hidden_layers=2), policies["window"], compile="eager")
    cache = read(model, prompt)
    cache.save(tmp_path / "cache.safetensors")
    expected = ask(model, prompt, 5, cache.copy())
    assert same(ask(model, prompt, 5, load_cache(model, tmp_path / "cache.safetensors")), expected)
    remove(model)
    apply(model, policies["window"])
    assert same(ask(model, prompt, 5, cache), expected)


def test_a_file_belongs_to_a_policy_and_a_shape(build, model, policies, prompt, tmp_path):
    file = tmp_path / "cache.safetensors"
    with pytest.raises(UsageError, match="carries no policy"):
        load_cache(model, file)
    apply(model, policies["scored"])
    with pytest.raises(CacheError, match=r"no cache can be read from .*cache\.safetensors"):
        load_cache(model, file)
    read(model, prompt).save(file)
    with pytest.raises(CacheError, match="layers 3 and not 2"):
        load_cache(apply(build(num_hidden_layers=2), policies["scored"]), file)
    with pytest.raises(CacheError, match="dtype float32 and not bfloat16"):
        load_cache(apply(build().bfloat16(), policies["scored"]), file)
    with pytest.raises(CacheError, match=r"made under policy scored .*this model carries window"):
        load_cache(apply(build(), policies["window"]), file)
    model = apply(build(), "raas", budget=60, page_size=4)
    read(model, prompt).save(file)
    with pytest.raises(CacheError, match="made under other numbers"):
        load_cache(apply(build(), "raas", budget=64, page_size=4), file)


def test_a_file_of_another_making(model, policies, prompt, tmp_path):
    apply(model, policies["scored"])
    file, odd = tmp_path / "cache.safetensors", tmp_path / "odd.safetensors"
    read(model, prompt).save(file)
    tensors = load_file(file)
    save_file(tensors, odd)
    with pytest.raises(CacheError, match="holds no cache"):
        load_cache(model, odd)
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])["__metadata__"]
    save_file({**tensors, "layers.0.0.keys": tensors["layers.0.0.keys"][..., :4].clone()}, odd, metadata=header)
    with pytest.raises(CacheError, match=r"does not fit .*'layers\.0\.0\.keys' differs"):
        load_cache(model, odd)
    later = {"kvpolicy": header["kvpolicy"].replace('"format": 1', '"format": 2')}
    save_file(tensors, odd, metadata=later)
    with pytest.raises(CacheError, match="format 2, and this kvpolicy reads 1"):
        load_cache(model, odd)
    odd.write_text("nothing of the kind")
    with pytest.raises(CacheError, match="no cache can be read"):
        load_cache(model, odd)


def test_not_in_the_middle_of_a_turn(model, policies, prompt, tmp_path):
    apply(model, policies["scored"])
    cache = cache_for(model, prompt=17, max_new_tokens=4, batch=2)
    cache.expect_prompt(17)
    with torch.no_grad():
        model(prompt[:, :5], past_key_values=cache)
    for act in (cache.copy, lambda: cache.save(tmp_path / "cache.safetensors")):
        with pytest.raises(CacheError, match="between turns only"):
            act()
    with pytest.raises(CacheError, match="once or more"):
        read(model, prompt).copy(repeats=0)
    with pytest.raises(CacheError, match=r"cache\.copy\(repeats=2\) has 4"):
        read(model, prompt).batch_repeat_interleave(2)
