"""Padding wherever it stands, prompts of one token and of none: a row of a batch is what it is alone."""

import pytest
import torch

from kvpolicy import UsageError, decode_loop, loads_policy
from kvpolicy.patching import apply, cache_for

NAMES = ["everything", "window", "scored", "paged"]


@pytest.fixture
def rows(prompt):
    """The tokens of each row: 17 of them, and 11."""
    return [prompt[:1], prompt[1:, 6:]]


@pytest.fixture
def right(prompt):
    """The same in one batch, the second row padded behind its tokens."""
    mask = torch.ones_like(prompt)
    mask[1, 11:] = 0
    return {"input_ids": torch.cat([prompt[:1], prompt[1:].roll(-6, 1)]) * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"prefill_chunk_size": 5}, {"custom_generate": decode_loop}, {"num_beams": 3}],
    ids=["plain", "chunks", "lean", "beams"],
)
def test_padding_on_the_right_is_no_different(model, policies, rows, right, greedy, name, settings):
    """Stock transformers warns, and begins such a row with what it read off the padding."""
    apply(model, policies[name])
    own = {key: value for key, value in settings.items() if key == "num_beams"}
    together = model.generate(**right, **settings, **greedy)[:, 17:]
    alone = [model.generate(row, **own, **greedy)[:, row.shape[1] :] for row in rows]
    assert torch.equal(together, torch.cat(alone))


def test_a_prompt_that_the_policy_reads_in_chunks(model, rows, right, greedy):
    text = (
        "kvpolicy: 1\nname: chunks\nprompt_chunk: 4\npools: {all: {admit: all, budget: 9, scorer: {signal: attention}}}"
    )
    apply(model, loads_policy(text))
    together = model.generate(**right, **greedy)[:, 17:]
    assert torch.equal(together, torch.cat([model.generate(row, **greedy)[:, row.shape[1] :] for row in rows]))


def test_both_sides_at_once_and_holes(model, policies, rows, greedy):
    """Where padding stands says nothing; only which tokens there are, and in which order."""
    apply(model, policies["scored"])
    mask = torch.zeros(2, 20, dtype=torch.long)
    mask[0, 1:18] = 1
    mask[1, [0, 2, 3, 4, 8, 9, 12, 13, 14, 16, 18]] = 1
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.cat(rows, 1)[0]
    together = model.generate(ids, attention_mask=mask, **greedy)[:, 20:]
    assert torch.equal(together, torch.cat([model.generate(row, **greedy)[:, row.shape[1] :] for row in rows]))


@pytest.mark.parametrize("name", ["scored", "paged"])
def test_a_later_turn_padded_on_the_right(model, policies, rows, right, greedy, name):
    apply(model, policies[name])
    settings = {"return_dict_in_generate": True, **greedy}
    ids, mask = right["input_ids"], right["attention_mask"]
    first = model.generate(**right, **settings)
    text = torch.cat([first.sequences, ids], 1)
    mask = torch.cat([mask, torch.ones(2, 24, dtype=mask.dtype), mask], 1)
    together = model.generate(text, attention_mask=mask, past_key_values=first.past_key_values, **greedy)[:, -24:]
    for row, tokens in zip(together, rows, strict=True):
        own = model.generate(tokens, **settings)
        text = torch.cat([own.sequences, tokens], 1)
        whole = torch.ones_like(text)  # of no mask, generate makes one where it meets a generated pad token
        again = model.generate(text, attention_mask=whole, past_key_values=own.past_key_values, **greedy)
        assert torch.equal(row, again[0, -24:])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_plain_call_has_the_tokens_own_outputs_and_repeats_the_last_behind_them(model, policies, right, name):
    ids, mask = right["input_ids"], right["attention_mask"]
    dense = model(ids, attention_mask=mask).logits
    apply(model, policies[name])
    for form in (True, False):  # a ModelOutput, and a tuple
        cache = cache_for(model, prompt=(11, 17), max_new_tokens=4, batch=2)
        logits = model(ids, attention_mask=mask, past_key_values=cache, return_dict=form)[0]
        torch.testing.assert_close(logits[mask.bool()], dense[mask.bool()], rtol=0, atol=1e-5)
        assert all(torch.equal(logits[1, column], logits[1, 10]) for column in range(11, 17))


@pytest.mark.parametrize("name", NAMES)
def test_one_token(model, policies, prompt, greedy, name):
    expected = model.generate(prompt[:, :1], **greedy)
    apply(model, policies[name])
    output = model.generate(prompt[:, :1], return_dict_in_generate=True, **greedy)
    assert output.past_key_values.clocks.prompt_len.tolist() == [1, 1]
    assert output.sequences.shape == (2, 25)
    if name == "everything":
        assert torch.equal(output.sequences, expected)


def test_no_ids_begin_with_the_models_own_token_and_an_empty_prompt_is_refused(model, policies, greedy):
    expected = model.generate(**greedy)
    apply(model, policies["everything"])
    assert torch.equal(model.generate(**greedy), expected)
    with pytest.raises(UsageError, match="the prompt is empty: give at least one token"):
        model.generate(torch.empty(1, 0, dtype=torch.long), **greedy)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_all_padding_leaves_the_others_alone(model, policies, prompt, greedy, name):
    apply(model, policies[name])
    mask = torch.ones_like(prompt)
    mask[1] = 0
    output = model.generate(prompt, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **greedy)
    assert torch.equal(output.sequences[:1], model.generate(prompt[:1], **greedy))
    assert torch.stack(output.logits).isfinite().all()
