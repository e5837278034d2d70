"""`builtin:tiny`: what ships is what was trained, it does its task, and it tells policies apart."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvpolicy
from kvpolicy.models import load_config, load_model
from kvpolicy.models.tiny import task
from kvpolicy.models.tiny.train import make_config, make_tokenizer

FOLDER = Path(task.__file__).parent
SHA256 = "9ff325dd5203204285403cfe9bdbbb75f9dc48ad3fa3ad1366fc0744b3bde1ea"


@pytest.fixture(scope="module")
def tiny():
    return load_model("builtin:tiny", device="cpu")


def accuracy(model, tokenizer, new_words, **size):
    """Mean share of right words over 40 problems, answered together."""
    problems = list(task.make_problems(40, seed=1, **size))
    batch = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.generate(
            batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=new_words, do_sample=False
        )
    answers = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(task.score(*pair) for pair in zip(problems, answers, strict=True)) / len(problems)


def test_the_weights_are_those_that_were_measured():
    assert hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest() == SHA256


def test_config_and_tokenizer_are_those_of_the_training_script():
    stored, made = json.loads((FOLDER / "config.json").read_text()), make_config().to_dict()
    assert {key: stored[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads")} == {
        key: made[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads")
    }
    _, tokenizer = load_model("builtin:tiny", device="cpu")
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab() == {w: i for i, w in enumerate(task.VOCABULARY)}


@pytest.mark.parametrize("size", [{"words": 8, "hums": 16}, {"words": 12, "hums": 64}, {"words": 16, "hums": 200}])
def test_it_does_its_task_under_the_full_cache(tiny, size):
    assert accuracy(*tiny, 48, **size) > 0.95


def test_a_policy_that_keeps_the_phrase_answers_and_one_that_drops_it_does_not(tiny):
    model, tokenizer = tiny
    shares = {}
    for name, params in {
        "raas": {"budget": 96, "page_size": 4},
        "window": {"window": 10},
        "streaming-llm": {"sinks": 4, "window": 10},
    }.items():
        with kvpolicy.applied(model, name, **params):
            shares[name] = accuracy(model, tokenizer, 64, words=12, hums=48)
    assert shares["raas"] > 0.9
    assert shares["window"] < 0.4 and shares["streaming-llm"] < 0.4


def test_problems_are_the_same_everywhere():
    first, second = task.make_problems(2, seed=3, words=5, hums=6)
    assert first == task.make_problem(3 * 1_000_003, words=5, hums=6) != second
    assert len(first.prompt.split()) == 5 + 6 + 1
    assert task.score(first, " ".join(first.answer(20))) == 1.0
    assert task.score(first, "hum " * 20) == 0.0 == task.score(first, "")
    with pytest.raises(ValueError, match="2 to 59 words"):
        task.make_problem(0, words=80)


def test_the_config_needs_no_torch():
    script = (
        "import sys; from kvpolicy.models import load_config as load; "
        "print(load('builtin:tiny').hidden_size, load('builtin:smollm2').hidden_size, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["96", "576", "False"]
    assert load_config("builtin:tiny").model_type == "llama"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("builtin:huge", "builtin:tiny"),
        ("./nowhere", "there is no folder"),
        ("/no/such/model.gguf", "there is no file"),
        ("", "no model was named"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(spec, words):
    with pytest.raises(kvpolicy.ModelError, match=words):
        load_model(spec)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(kvpolicy.ModelError, match=r"no config\.json"):
        load_model(str(tmp_path))


@pytest.mark.smollm2
def test_smollm2_is_converted_once_and_speaks(capsys):
    said = []
    model, tokenizer = load_model("builtin:smollm2", device="cpu", notify=said.append)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    said.clear()
    load_model("builtin:smollm2", device="cpu", notify=said.append)
    assert not any("fetch" in line or "convert" in line for line in said)
