"""What people put before `generate`: pipelines, chats, streamers, processors, criteria, and modes with names."""

import contextlib
import copy
import io
import threading

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer, pipeline

from kvpolicy import UsageError
from kvpolicy.models import load_model
from kvpolicy.patching import applied, apply

TEXTS = ["hum owl red tin sky fog hum hum owl", "hum owl red"]
SETTINGS = {"do_sample": False, "max_new_tokens": 20}
CHAT = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def loaded():
    return load_model("builtin:tiny", device="cpu")


@pytest.fixture
def model(loaded):
    """The trained model under a policy that forgets early."""
    with applied(loaded[0], "streaming-llm", sinks=2, window=6) as model:
        yield model


@pytest.fixture
def tokenizer(loaded):
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.chat_template = CHAT
    return tokenizer


def said(model, tokenizer, text):
    """What generate says after a text, without a pipeline."""
    inputs = tokenizer(text, return_tensors="pt")
    return tokenizer.decode(model.generate(**inputs, **SETTINGS)[0, inputs.input_ids.shape[1] :])


def test_a_pipeline_with_one_text_with_many_and_with_none(model, tokenizer):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    wanted = [text + said(model, tokenizer, text) for text in TEXTS]
    assert [pipe(text, **SETTINGS)[0]["generated_text"] for text in TEXTS] == wanted
    assert [each[0]["generated_text"] for each in pipe(TEXTS, batch_size=2, **SETTINGS)] == wanted
    assert len(pipe(TEXTS[0], do_sample=True, num_return_sequences=3, max_new_tokens=5)) == 3
    assert pipe("", **SETTINGS)[0]["generated_text"]


def test_a_pipeline_that_chats(model, tokenizer):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": TEXTS[0]}]
    first = pipe(chat, **SETTINGS)[0]["generated_text"]
    assert first[-1] == {"role": "assistant", "content": said(model, tokenizer, TEXTS[0] + " ")}
    longer = [*first, {"role": "user", "content": "owl red"}]
    both = pipe([longer, chat], batch_size=2, **SETTINGS)
    assert [each[0]["generated_text"][-1] for each in both] == [
        pipe(each, **SETTINGS)[0]["generated_text"][-1] for each in (longer, chat)
    ]


def test_a_chat_of_several_turns_on_one_cache(model, tokenizer):
    """The whole conversation goes in each time; the cache knows how much of it is new."""
    turns, cache, sizes = [], None, []
    for words in (TEXTS[0], "owl", "red tin", "sky"):
        turns.append({"role": "user", "content": words})
        inputs = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, past_key_values=cache, return_dict_in_generate=True, **SETTINGS)
        cache, new = output.past_key_values, output.sequences[0, inputs["input_ids"].shape[1] :]
        turns.append({"role": "assistant", "content": tokenizer.decode(new)})
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        sizes.append(cache.stats()["resident"])
    assert cache.passes["prompt"] == 4
    assert max(sizes) == 8


def test_text_streams_as_it_comes_also_from_a_thread(model, tokenizer):
    inputs, wanted = tokenizer(TEXTS[0], return_tensors="pt"), said(model, tokenizer, TEXTS[0])
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), **SETTINGS)
    assert shown.getvalue().strip() == wanted.strip()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, **SETTINGS})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).strip() == wanted.strip()
    assert len(pieces) > 10


CONSTRAINTS = {
    "allowed": {"prefix_allowed_tokens_fn": lambda row, text: [3, 4, 5 + row]},
    "biased": {"sequence_bias": {(4,): 3.0, (9, 7): -2.0}, "bad_words_ids": [[5, 3], [11]]},
    "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    "ended": {"stopping_criteria": [lambda text, scores: text[:, -1] % 5 == 0]},
    "guided": {"guidance_scale": 1.5},  # runs the model twice a token: once on a cache of its own, without the prompt
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
    "drawn beams": {"num_beams": 3, "do_sample": True, "top_k": 20},
    "drawn": {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9, "min_p": 0.01, "temperature": 1.5},
}


@pytest.mark.parametrize("settings", CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
def test_constraints_hold_and_change_nothing_else(build, policies, padded, settings):
    """With room for everything the text is the unpatched model's; under a budget the constraint holds all the same."""
    settings = {"do_sample": False, "max_new_tokens": 12, **settings}

    def run(model, **more):
        torch.manual_seed(0)
        return model.generate(**padded, **settings, **more)

    model = build()
    expected = run(model)
    with applied(model, policies["everything"]):
        assert torch.equal(run(model), expected)
    apply(model, policies["scored"])
    output = run(model, return_dict_in_generate=True)
    assert output.past_key_values.stats()["evicted"] > 0
    new = output.sequences[:, 17:]
    if "prefix_allowed_tokens_fn" in settings:
        assert all(set(new[row].tolist()) <= {3, 4, 5 + row} for row in (0, 1))


def test_all_that_generate_can_return(build, policies, padded, greedy):
    model = apply(build(), policies["scored"])
    asked = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    output = model.generate(**padded, return_dict_in_generate=True, **asked, **greedy)
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == 24
    assert [len(step) for step in output.hidden_states] == [4] * 24
    transitions = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert transitions.shape == (2, 24) and transitions.max() <= 0


@pytest.mark.parametrize(
    "settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"dola_layers": "high"}], ids=str
)
def test_modes_that_take_tokens_back_or_lie_elsewhere_are_refused(build, policies, prompt, greedy, settings):
    """DoLa, contrastive and group beam search have left transformers, which says where they are now."""
    model = apply(build(), policies["scored"])
    with pytest.raises((UsageError, ValueError), match=r"assisted decoding|trust_remote_code"):
        model.generate(prompt[:1], **settings, **greedy)


def test_continuous_batching_is_refused_while_the_policy_is_on(build, policies, greedy):
    """Else it would run without the policy, and say nothing."""
    model = build()
    with applied(model, policies["scored"]), pytest.raises(UsageError, match=r"paged cache.*scored; call generate"):
        model.generate_batch([[5, 6, 7]])
    assert "init_continuous_batching" not in vars(model)
