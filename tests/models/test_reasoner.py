"""`builtin:reasoner`: what ships is what was trained, its problems are right, and it solves them."""

import hashlib
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kvpolicy.lab.compare.arms import arms
from kvpolicy.lab.compare.running import Options, Run
from kvpolicy.lab.tasks.registry import task_named
from kvpolicy.language import load_policy
from kvpolicy.models import load_model
from kvpolicy.models.reasoner import problem as problems
from kvpolicy.models.reasoner import train as script
from kvpolicy.models.reasoner.problem import FACTS, LINE, REST, STEPS, VOCABULARY, make_problem

FOLDER = Path(problems.__file__).parent
SHA256 = "f04719c7b2786972fed789c498c94a0c2efa7e5ef7544f1da49acdc414c7a5bc"


@pytest.fixture(scope="module")
def reasoner():
    return load_model("builtin:reasoner", device="cpu")


def uses(output):
    """By name, the lines that add it."""
    found = {}
    for line, (first, second) in enumerate(re.findall(r"=(.)\+(.):", output)):
        for name in (first, second):
            found.setdefault(name, []).append(line)
    return found


def test_the_weights_are_those_that_were_measured():
    assert hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest() == SHA256


def test_config_and_tokenizer_are_those_of_the_training_script(reasoner):
    model, tokenizer = reasoner
    stored, made = json.loads((FOLDER / "config.json").read_text()), script.make_config().to_dict()
    told = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert {key: stored[key] for key in told} == {key: made[key] for key in told}
    assert model.num_parameters() == 609_152
    assert tokenizer.get_vocab() == script.make_tokenizer().get_vocab() == {w: i for i, w in enumerate(VOCABULARY)}
    text = make_problem(random.Random(1)).prompt
    ids = tokenizer(text).input_ids
    assert len(ids) == 1 + len(text) == 2 + 2 * FACTS + 4 * STEPS
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("seed", range(4))
def test_a_problem_has_one_right_output(seed):
    """Worked out anew from the prompt alone."""
    made = make_problem(random.Random(seed), steps=20, facts=6)
    told, _, definitions = made.prompt.removesuffix("|").partition(">")
    value = {name: int(digit) for name, digit in re.findall(r"([A-Za-z])(\d)", told)}
    assert len(value) == 6
    lines = []
    for name, first, second in definitions.split(">"):
        one, two = value[first], value[second]
        value[name] = (one + two) % 10
        lines.append(f"{name}={first}+{second}:{one}+{two}:{name}{value[name]};")
    assert "".join(lines) == made.output and len(made.output) == 20 * LINE
    assert made.value == value


@pytest.mark.parametrize("seed", range(4))
def test_milestones_are_used_for_a_while_and_phoenixes_late(seed):
    made = make_problem(random.Random(seed))
    used, born = uses(made.output), {name: line for line, (name, *_) in enumerate(made.definitions)}
    assert len(made.milestones) >= 4
    for name, last in made.milestones:
        lines = [line for line in used.get(name, ()) if line <= last]
        # Two milestones that are due in the same line take turns, so that one of them waits a line longer.
        assert all(after - before <= REST + 1 for before, after in pairwise([born[name] + 3, *lines]))
    assert max(last - born[name] for name, last in made.milestones) * LINE > 100
    for name in made.phoenixes:
        assert min(used.get(name, [STEPS])) > problems.LATE * STEPS


def test_problems_are_the_same_everywhere():
    made = make_problem(random.Random(3), steps=3, facts=2)
    assert made == make_problem(random.Random(3), steps=3, facts=2)
    assert hashlib.sha256(repr(made).encode()).hexdigest()[:12] == "d5e966a5fff8"
    for wrong in ({"steps": 0}, {"facts": 0}, {"steps": 50, "facts": 3}):
        with pytest.raises(ValueError, match="52 in all"):
            make_problem(random.Random(0), **wrong)


def test_lessons_grow_longer_as_they_are_learned_and_end(monkeypatch):
    monkeypatch.setattr(script, "COOLING", 3)
    monkeypatch.setattr(script, "TOKENS", 1400)
    school, lengths = script.School(random.Random(0)), []
    assert school.lesson(0, 0.0) is not None
    while (lesson := school.lesson(len(lengths), 1.0)) is not None:
        lengths.append(school.lines)
        asked = lesson.labels != -100
        assert asked.any() and torch.equal(lesson.ids[asked], lesson.labels[asked])
        assert lesson.rate <= script.LEARNING_RATE
    assert lengths == sorted(lengths) and lengths[-1] == script.LONGEST
    slow = script.School(random.Random(0))
    for step in range(30):
        assert slow.lesson(step, 0.9) is not None
    assert slow.lines == 3


@pytest.mark.slow
def test_policies_are_told_apart(reasoner):
    """At two thirds of the text: what ranks by the last use keeps milestones that others lose."""
    model, tokenizer = reasoner
    made = Run(model, tokenizer, "builtin:reasoner", Options(count=8, batch=8))
    asked = [(name, load_policy(name), {}) for name in ("raas", "h2o", "streaming-llm")]
    made.run(arms(asked, [384]), [task_named("chain")])
    right = {row.label: [] for row in made.rows}
    for row in made.rows:
        right[row.label].append(row.share)
    share = {label: sum(of) / len(of) for label, of in right.items()}
    assert share["dense"] > 0.95 and share["raas"] > 0.85
    assert share["raas"] > share["h2o"] + 0.05 > share["random"] + 0.1 and share["raas"] > share["window"] + 0.15
    assert share["streaming-llm"] < 0.8


def test_it_solves_its_problems_under_the_full_cache(reasoner):
    """More than 95 in 100 results, hundreds of tokens after the prompt, and it knows where to end."""
    model, tokenizer = reasoner
    task = task_named("chain")
    items = task.make(12, seed=1)
    batch = tokenizer([item.prompt for item in items], return_tensors="pt", padding=True)
    with torch.no_grad():
        text = model.generate(**batch, max_new_tokens=task.new_tokens(items[0]), do_sample=False)
    outputs = tokenizer.batch_decode(text[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    right = [mark for item, output in zip(items, outputs, strict=True) for mark in task.grade(item, output)]
    assert sum(right) / len(right) > 0.95
    assert sum(len(output) == STEPS * LINE for output in outputs) >= 11
