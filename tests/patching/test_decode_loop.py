"""The lean loop says what stock `generate` says, with a look at the device only once in a while."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from kvpolicy import UsageError
from kvpolicy.patching import apply, cache_for
from kvpolicy.runtime.choosing import sample
from kvpolicy.runtime.decode import DecodeLoop, decode_loop

PROCESSED = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4, "suppress_tokens": [0, 5]}


@pytest.fixture(params=["scored", "paged", None])
def ready(request, model, policies):
    """A model under each policy, and one under none."""
    return model if request.param is None else apply(model, policies[request.param])


def both(model, inputs, loop=decode_loop, seed=0, **settings):
    """Stock and lean, from the same seed."""
    torch.manual_seed(seed)
    stock = model.generate(**inputs, **settings)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    lean = model.generate(**inputs, custom_generate=loop, **settings)
    return stock, lean, torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("settings", [{}, PROCESSED, {"prefill_chunk_size": 5}], ids=["plain", "processed", "chunked"])
def test_greedy(ready, padded, greedy, settings):
    stock, lean, _ = both(ready, padded, **greedy, **settings)
    assert torch.equal(stock, lean)


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 9, "top_p": 0.9, "temperature": 1.7, **PROCESSED}])
def test_sampling_draws_the_same_and_leaves_the_generator_where_it_was(ready, padded, settings):
    stock, lean, same_state = both(ready, padded, do_sample=True, max_new_tokens=30, num_return_sequences=2, **settings)
    assert torch.equal(stock, lean)
    assert same_state


def test_every_family(build, family, policies, padded, greedy):
    stock, lean, _ = both(apply(build(family), policies["scored"]), padded, **greedy)
    assert torch.equal(stock, lean)


def test_a_draw_is_a_draw_of_multinomial():
    for seed in range(50):
        scores = 4 * torch.randn(5, 300, generator=torch.Generator().manual_seed(seed))
        scores[:, :50] = -torch.inf
        torch.manual_seed(seed)
        expected = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        torch.manual_seed(seed)
        assert torch.equal(sample(scores), expected)


@pytest.mark.parametrize("check_every", [1, 3, 1000])
@pytest.mark.parametrize("ends", [(2, 7), (5, None), (0, 0)])
def test_rows_end_where_they_end(ready, padded, greedy, check_every, ends):
    """Each row at its own token; what was decoded beyond the last of them is cut off."""
    free = ready.generate(**padded, **greedy)[:, 17:]
    end = [free[row, place].item() for row, place in enumerate(ends) if place is not None]
    stock, lean, _ = both(ready, padded, DecodeLoop(check_every), eos_token_id=end, **greedy)
    assert torch.equal(stock, lean)


def test_sampled_rows_that_end_leave_the_others_alone(ready, padded):
    settings = {"do_sample": True, "max_new_tokens": 30, "eos_token_id": list(range(2, 20))}
    for seed in range(5):
        stock, lean, _ = both(ready, padded, seed=seed, **settings)
        assert torch.equal(stock, lean)


class StopsRow(StoppingCriteria):
    """Stops one row at one length."""

    def __init__(self, row, length):
        self.row, self.length = row, length

    def __call__(self, input_ids, scores, **kwargs):
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[self.row] = input_ids.shape[1] >= self.length
        return done


@pytest.mark.parametrize("check_every", [1, 4, 16])
def test_stopping_criteria_of_the_callers(ready, padded, greedy, check_every):
    for rows in ([(0, 20)], [(0, 20), (1, 27)]):
        criteria = StoppingCriteriaList([StopsRow(*row) for row in rows])
        stock, lean, _ = both(ready, padded, DecodeLoop(check_every), stopping_criteria=criteria, **greedy)
        assert torch.equal(stock, lean)


def test_time_is_up_at_the_first_token(ready, padded, greedy):
    criteria = StoppingCriteriaList([MaxTimeCriteria(0.0)])
    stock, lean, _ = both(ready, padded, stopping_criteria=criteria, **greedy)
    assert stock.shape == lean.shape == (2, 18)


def test_what_is_returned_of_every_step(ready, padded, greedy):
    names = ("scores", "logits", "hidden_states")
    settings = {"return_dict_in_generate": True, **{f"output_{name}": True for name in names}}
    stock, lean, _ = both(ready, padded, eos_token_id=[7, 9], **settings, **greedy)
    assert type(stock) is type(lean)
    assert torch.equal(stock.sequences, lean.sequences)
    assert stock.past_key_values.get_seq_length() == lean.past_key_values.get_seq_length()
    for name in names:
        ours, theirs = getattr(lean, name), getattr(stock, name)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_embeddings_in_place_of_ids(ready, padded, greedy):
    inputs = {
        "inputs_embeds": ready.get_input_embeddings()(padded["input_ids"]),
        "attention_mask": padded["attention_mask"],
    }
    stock, lean, _ = both(ready, inputs, **greedy)
    assert torch.equal(stock, lean)


def test_a_cache_that_the_caller_keeps_is_exact(model, policies, padded, greedy):
    """Nothing enters it that the stock loop would not have decoded: a second turn then agrees too."""
    apply(model, policies["scored"])
    end = model.generate(**padded, **greedy)[:, 17 + 5].tolist()
    answers = []
    for loop in (None, DecodeLoop(check_every=16)):
        cache = cache_for(model, prompt=(11, 60), max_new_tokens=60, batch=2, turns=2)
        settings = {"custom_generate": loop, "past_key_values": cache, **greedy}
        first = model.generate(**padded, eos_token_id=end, **settings)
        text = torch.cat([first, torch.full((2, 5), 8)], 1)
        more = text.shape[1] - 17
        mask = torch.cat([padded["attention_mask"], torch.ones(2, more, dtype=torch.long)], 1)
        answers.append((model.generate(text, attention_mask=mask, **settings), cache.positions(2)))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


class Collect(BaseStreamer):
    def __init__(self):
        self.received, self.ended = [], False

    def put(self, value):
        self.received.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("check_every", [1, 4, 100])
@pytest.mark.parametrize("ends", [True, False])
def test_streaming(model, policies, prompt, greedy, check_every, ends):
    apply(model, policies["window"])
    if ends:
        greedy["eos_token_id"] = model.generate(prompt[:1], **greedy)[0, 17 + 9].item()
    stock, lean = Collect(), Collect()
    expected = model.generate(prompt[:1], streamer=stock, **greedy)
    output = model.generate(prompt[:1], custom_generate=DecodeLoop(check_every, lean), **greedy)
    assert torch.equal(output, expected)
    assert lean.received == stock.received
    assert lean.ended


class Looks(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["everything", "window", "scored", "paged"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_no_token_makes_the_host_wait(model, policies, prompt, name, do_sample):
    """The number of looks at the device does not grow with the number of tokens."""
    apply(model, policies[name])

    def looks(tokens, **settings):
        with Looks() as looks:
            model.generate(prompt, custom_generate=decode_loop, do_sample=do_sample, max_new_tokens=tokens, **settings)
        return looks.count

    assert looks(40) == looks(10)
    # With an end to look for, one copy of a block of flags in 16 tokens; a copy reads no scalar.
    assert looks(40, eos_token_id=1) == looks(10, eos_token_id=1)


def test_what_the_loop_refuses(model, policies, prompt, greedy):
    apply(model, policies["window"])

    def run(**settings):
        return model.generate(prompt, custom_generate=decode_loop, **{**greedy, **settings})

    with pytest.raises(UsageError, match=r"not beam search; call generate without custom_generate"):
        run(num_beams=2)
    with pytest.raises(UsageError, match="needs a cache"):
        run(use_cache=False)
    with pytest.raises(UsageError, match="check_every is 0"):
        DecodeLoop(check_every=0)
    with pytest.raises(UsageError, match="synced_gpus"):
        decode_loop(model, prompt, None, None, model.generation_config, synced_gpus=True)
