"""Tasks: equal items everywhere, and graders against planted right, wrong, reordered, cut and rambling outputs."""

import hashlib
import random
import re
from itertools import pairwise

import pytest

from kvpolicy.errors import UsageError
from kvpolicy.lab.tasks.base import Item, Task, first_said
from kvpolicy.lab.tasks.questions import given
from kvpolicy.lab.tasks.registry import GROUP, task_named, tasks

NAMED = [name for name in tasks() if name not in ("passkey", "phrase")]
"""Tasks that ask for several answers under names, in any order."""

DIGESTS = {
    "chain": "cdf77b28c8fd",
    "copy": "ecbe331eaf95",
    "needles": "32647897937a",
    "passkey": "e0c55fc3530b",
    "phrase": "f4b650b674c3",
    "questions": "b2c7fad63864",
    "variables": "c3d4fa60c24e",
    "worksheet": "829ff494d58c",
}

FORMS = {
    "chain": "d=a+b:1+2:{0}{1};",
    "worksheet": "{0} = ANNE + BERT = 1 + 2 = {1}\n",
    "questions": "Answer_{0}:\n1 + 1 = 2. The answer is {1}.\n\n",
}


def output(item: Item, answers: dict[str, str] | None = None, order: list[str] | None = None) -> str:
    """What a model would write: a line for each name."""
    told = dict(zip(item.names, item.answers, strict=True)) if answers is None else answers
    form = FORMS.get(item.task, "{0}: {1}\n")
    return "".join(form.format(name, told[name]) for name in (order or list(told)))


def wrong(answer: str) -> str:
    """In the form of an answer, and not it."""
    return str((int(answer[-1]) + 1) % 10) if answer.isdigit() else "no such line here"


def right(item: Item) -> str:
    if item.task == "passkey":
        return f" {item.answers[0]}. I found it."
    if item.task == "phrase":
        return " ".join(item.answers)
    return output(item)


@pytest.fixture(params=list(tasks()))
def task(request: pytest.FixtureRequest) -> Task:
    return task_named(request.param)


@pytest.fixture(params=NAMED)
def named(request: pytest.FixtureRequest) -> Task:
    return task_named(request.param)


def test_items_are_equal_on_every_machine(task: Task) -> None:
    """The digest of what was made when this was written: another one makes old rows worthless, and must be meant."""
    made = task.make(3, seed=7)
    digest = hashlib.sha256(repr(made).encode()).hexdigest()[:12]
    assert digest == DIGESTS[task.name]
    random.random()
    assert task.make(3, seed=7) == made
    assert task.make(5, seed=7)[:3] == made and task.make(3, seed=8) != made


@pytest.mark.parametrize("scale", [1, 2])
def test_prompts_have_their_size_and_facts_their_place(task: Task, scale: int) -> None:
    size = min(task.size * scale, task.most or task.size * scale)
    for item in task.make(4, seed=1, size=size):
        assert abs(len(task.words(item.prompt)) - size) <= max(30, 0.07 * size)
        assert all(0 <= place < 1 for place in item.about)
        assert task.new_tokens(item) >= len(task.words(right(item)))


def test_a_text_too_short_is_refused(task: Task) -> None:
    assert task.make(1, seed=0, size=task.least)
    with pytest.raises(UsageError, match=f"{task.name} .*{task.least}"):
        task.make(1, seed=0, size=task.least - 1)


def test_a_right_output_is_all_right(task: Task) -> None:
    for item in task.make(8, seed=2):
        assert all(task.grade(item, right(item))) and task.finished(item, right(item))
        assert all(task.grade(item, f"Let me see: 3 names?</think>{right(item)}"))


def test_nothing_said_is_all_wrong_and_unfinished(task: Task) -> None:
    for said in ("", "I do not know.", "hum hum"):
        for item in task.make(2, seed=2):
            assert not any(task.grade(item, said)) and not task.finished(item, said)


def test_another_items_answers_are_wrong(task: Task) -> None:
    """Shuffled labels give chance, which is little: answers of two digits meet by chance more often than others."""
    items = task.make(12, seed=3)
    marks = [mark for item, other in pairwise(items) for mark in task.grade(item, right(other))]
    assert sum(marks) / len(marks) < 0.15


def test_order_does_not_matter(named: Task) -> None:
    for item in named.make(4, seed=4):
        order = list(item.names)
        random.Random(0).shuffle(order)
        assert all(named.grade(item, output(item, order=order)))


def test_one_left_out_is_one_wrong(named: Task) -> None:
    for item in named.make(4, seed=5):
        marks = named.grade(item, output(item, order=list(item.names[1:])))
        assert marks == (False, *[True] * (len(item.names) - 1))
        assert not named.finished(item, output(item, order=list(item.names[1:])))


def test_one_wrong_is_one_wrong(named: Task) -> None:
    for item in named.make(4, seed=6):
        told = dict(zip(item.names, item.answers, strict=True))
        told[item.names[0]] = wrong(item.answers[0])
        marks = named.grade(item, output(item, told))
        assert marks == (False, *[True] * (len(item.names) - 1)) and named.finished(item, output(item, told))


def test_the_first_that_is_said_counts(named: Task) -> None:
    """Nobody is right by saying a right thing after a wrong one, nor wrong by rambling after a right one."""
    for item in named.make(4, seed=7):
        told = dict(zip(item.names, map(wrong, item.answers), strict=True))
        assert all(named.grade(item, output(item) + output(item, told)))
        assert not any(named.grade(item, output(item, told) + output(item)))


def test_a_cut_output_loses_what_was_cut(named: Task) -> None:
    """Wherever a limit ends it, what was whole is right, what comes later is wrong, and nothing else is."""
    item = named.make(1, seed=8)[0]
    text = output(item)
    before = 0
    for end in range(0, len(text), 3):
        marks = named.grade(item, text[:end], cut=True)
        assert list(marks) == sorted(marks, reverse=True) and sum(marks) >= before
        before = sum(marks)
    assert before >= len(item.names) - 1
    assert not named.finished(item, text[: len(text) // 2], cut=True)


def test_half_a_number_is_no_number() -> None:
    task = task_named("passkey")
    item = task.make(1, seed=0)[0]
    assert task.grade(item, f" {item.answers[0]}") == (True,)
    assert task.grade(item, f" {item.answers[0]}", cut=True) == (False,)  # the next token might have been a digit
    assert task.grade(item, f" {item.answers[0]}.\nWhat", cut=True) == (True,)
    assert task.grade(item, f" {item.answers[0]}7") == (False,)
    number = item.answers[0]
    assert task.grade(item, f" {number[:2]},{number[2:]}, as I said") == (True,)
    assert task.grade(item, f" 12345 or {number}") == (False,)


def test_names_that_begin_alike_are_told_apart() -> None:
    assert first_said(["1", "12"], "[a-z]+", "12: owl\n1: red") == {"12": "owl", "1": "red"}
    assert first_said(["Fern", "Ferny"], r"\d+", "**Ferny** is 7, FERN: 8, and Fern = 9") == {"Ferny": "7", "Fern": "8"}
    assert first_said(["Fern"], r"\d+", "Ferns have 12 leaves; 13") == {}


def test_questions_are_found_under_their_number() -> None:
    """LongGenBench's own scoring goes by order: a question left out or answered twice shifts all later ones."""
    task = task_named("questions")
    item = task.make(1, seed=1)[0]
    parts = [
        f"Answer_{name}: so the answer is {answer}.\n" for name, answer in zip(item.names, item.answers, strict=True)
    ]
    assert all(task.grade(item, "".join(parts)))
    assert task.grade(item, "".join(parts[:1] + parts[2:])) == (True, False, *[True] * (len(parts) - 2))
    assert all(task.grade(item, "".join([parts[0], *parts])))
    noisy = "".join(re.sub(r"is (\d+)", r"is: **$\1.00**", part).replace("Answer_", "Answer ") for part in parts)
    assert all(task.grade(item, noisy))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (":\n2 + 3 = 5.\nThe answer is 5.", "5"),
        (":\nThe answer is $1,250.00.", "1250"),
        (": the answer is -3.5 degrees", "-3.5"),
        (": 42", "42"),
        (": 2 + 3 = 5", None),
        (": I do not know.", None),
        (": The answer is **7**. No, the answer is 8.", "7"),
    ],
)
def test_what_counts_as_a_given_answer(text: str, number: str | None) -> None:
    assert given(text) == number


def test_a_phrase_is_scored_by_what_follows_what() -> None:
    task = task_named("phrase")
    item = task.make(1, seed=0)[0]
    words = right(item).split()
    skipped = task.grade(item, " ".join(words[:5] + words[6:]))
    assert 2 <= skipped.count(False) <= 3  # the word before, the word itself, and the last that was never reached
    assert task.grade(item, " ".join(words[:12])) == (*[True] * 12, *[False] * 36)
    loop = task.grade(item, " ".join(words[:2] * 24))
    assert sum(loop) <= 5
    assert task.period(item) == 12


def test_tasks_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by their entry point; our own win on a clash; what is no task is refused in one sentence."""
    from kvpolicy.lab.tasks import registry

    class Other(type(task_named("passkey"))):  # type: ignore[misc]
        name = "other"

    class Entry:
        def __init__(self, name: str, leads_to: object) -> None:
            self.name, self.value, self.dist, self.leads_to = name, "there:TASK", None, leads_to

        def load(self) -> object:
            return self.leads_to

    def found(*entries: Entry) -> dict[str, Task]:
        monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == GROUP else ())
        tasks.cache_clear()
        return dict(tasks())

    try:
        assert isinstance(found(Entry("other", Other()))["other"], Other)
        clash = Other()
        clash.name = "passkey"
        assert not isinstance(found(Entry("passkey", clash))["passkey"], Other)
        with pytest.raises(UsageError, match=r"the task `x` leads to there:TASK"):
            found(Entry("x", 3))
    finally:
        monkeypatch.undo()
        tasks.cache_clear()
    with pytest.raises(UsageError, match="did you mean `passkey`"):
        task_named("paskey")
