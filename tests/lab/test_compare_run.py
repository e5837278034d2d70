"""Running a comparison on builtin:tiny: what must hold of any evaluator, whatever the policies are worth."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvpolicy.errors import ModelError, UsageError
from kvpolicy.lab.compare.arms import Arm, arms, bound, leaves_unread, selects
from kvpolicy.lab.compare.report import chance, report
from kvpolicy.lab.compare.rows import Row, read
from kvpolicy.lab.compare.running import Options, Run
from kvpolicy.lab.compare.verdicts import verdicts
from kvpolicy.lab.tasks.base import Item, Task
from kvpolicy.lab.tasks.registry import task_named
from kvpolicy.language import load_policy
from kvpolicy.models import load_model
from kvpolicy.plan import ModelGeometry

PHRASE = task_named("phrase")


class Uneven(type(PHRASE)):  # type: ignore[misc]
    """The same with prompts of different lengths."""

    def item(self, number: int, rng: Any, size: int) -> Item:
        return super().item(number, rng, size + 7 * (number % 3))


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("builtin:tiny")


def run(tiny: tuple[Any, Any], of: Sequence[Arm], task: Task = PHRASE, path: Path | None = None, **options: Any) -> Run:
    made = Run(*tiny, "builtin:tiny", Options(**{"count": 3, "size": 60, "new_tokens": 24, **options}), path)
    made.run(of, [task])
    return made


def named(*names: str, **given: str) -> list[tuple[str, Any, dict[str, str]]]:
    return [(name, load_policy(name), given) for name in names]


def by_arm(rows: Sequence[Row]) -> dict[tuple[str, int | None], list[Row]]:
    found: dict[tuple[str, int | None], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.number):
        found.setdefault((row.label, row.budget), []).append(row)
    return found


# What must hold of an evaluator -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["raas", "random", "tova", "knorm", "random-unpinned"])
def test_a_budget_above_the_length_is_the_full_cache(tiny: tuple[Any, Any], name: str) -> None:
    """The very same output and marks, nothing evicted, and so no score is reported."""
    made = run(tiny, arms(named(name, budget="400"), [None]))
    full, policy = by_arm(made.rows).values()
    assert [row.output for row in full] == [row.output for row in policy]
    assert [row.right for row in full] == [row.right for row in policy]
    assert not any(row.evicted or row.worked for row in policy)
    found = report(made.rows, {"phrase": PHRASE})
    assert found.entries[0].score is not None and found.entries[1].score is None
    assert any("never evicted" in verdict for verdict in verdicts(found, made.rows))


def test_such_a_budget_is_refused_when_asked_for(tiny: tuple[Any, Any]) -> None:
    made = run(tiny, arms(named("h2o"), [24, 400]), count=1, new_tokens=4)
    assert "holds all of a text of 61 and 4 new ones" in made.refused["phrase", "h2o", 400]
    assert ("h2o", 24) in by_arm(made.rows) and ("h2o", 400) not in by_arm(made.rows)


def test_other_labels_give_chance(tiny: tuple[Any, Any]) -> None:
    """The model is right nearly always, and about another item's question nearly never."""
    made = run(tiny, arms([], []), count=8)
    assert sum(row.share for row in made.rows) / 8 == pytest.approx(0.5)  # 24 of the 48 answers asked for
    assert chance(PHRASE, made.rows) < 0.02


def test_more_budget_is_no_worse(tiny: tuple[Any, Any]) -> None:
    made = run(tiny, arms(named("h2o"), [12, 48]), count=4)
    scores = {key: sum(row.share for row in rows) for key, rows in by_arm(made.rows).items()}
    assert scores["window", 12] <= scores["window", 48] and scores["h2o", 12] < scores["h2o", 48]
    assert scores["dense", None] > scores["h2o", 12] + 0.5
    found = report(made.rows, {"phrase": PHRASE})
    assert not any("is worse at" in verdict for verdict in verdicts(found, made.rows))


def test_a_row_of_a_batch_is_what_it_is_alone(tiny: tuple[Any, Any]) -> None:
    """Prompts of different lengths, some texts ended early: outputs, marks and counts do not know of the others."""
    model, tokenizer = tiny
    uneven = Uneven()
    word = uneven.make(2, 0, 60)[1].answers[6]
    before, model.generation_config.eos_token_id = (
        model.generation_config.eos_token_id,
        tokenizer.convert_tokens_to_ids(word),
    )
    try:
        of = arms(named("h2o"), [30])
        together = run(tiny, of, uneven, batch=3)
        alone = run(tiny, of, uneven, batch=1)
    finally:
        model.generation_config.eos_token_id = before
    assert len({row.prompt_tokens for row in together.rows}) == 3
    assert any(row.new_tokens < 24 and not row.cut for row in together.rows) and any(row.cut for row in together.rows)
    assert any(row.evicted for row in together.rows)
    for one, other in zip(
        *(sorted(made.rows, key=lambda row: (row.label, row.number)) for made in (together, alone)), strict=True
    ):
        assert replace(one, bytes=0) == replace(other, bytes=0)


def test_what_is_counted_is_what_left(tiny: tuple[Any, Any]) -> None:
    """`window` of 30: all but 30 of a text's tokens left each of the heads of each layer, the last one unread."""
    made = run(tiny, arms(named("window"), [30]), count=2)
    heads = made.geometry.kv_heads * made.geometry.layers
    for row in by_arm(made.rows)["window", 30]:
        assert row.evicted == heads * (row.prompt_tokens + row.new_tokens - 1 - 30) and row.resident == 30
    assert {row.held for row in by_arm(made.rows)["window", 30]} == {30}


def test_an_output_that_is_cut_says_so(tiny: tuple[Any, Any]) -> None:
    made = run(tiny, arms([], []), new_tokens=5)
    assert all(row.cut and row.truncated and sum(row.right) == 5 for row in made.rows)
    whole = run(tiny, arms([], []), new_tokens=None)
    assert not any(row.truncated or row.looped for row in whole.rows)


def test_only_models_that_do_not_talk_are_given_the_answers_beginning(tiny: tuple[Any, Any]) -> None:
    class Talks:
        """A tokenizer of letters."""

        unk_token_id = None

        def __init__(self, chat_template: str | None) -> None:
            self.chat_template = chat_template

        def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> str:
            return f"<{turns[0]['content']}>"

        def __call__(self, text: str, **_: object) -> Any:
            return SimpleNamespace(input_ids=torch.tensor([[ord(letter) for letter in text]]))

    item = task_named("passkey").make(1, 0)[0]

    def read(template: str | None, chat: bool | None) -> str:
        made = Run(tiny[0], Talks(template), "m", Options(chat=chat))
        return "".join(map(chr, made._ids(item).tolist()))

    assert read("t", None) == f"<{item.prompt}>" and item.lead == " The pass key is"
    assert read("t", False) == read(None, None) == item.prompt + item.lead


# Arms ---------------------------------------------------------------------------------------------------------------


def test_the_full_cache_and_two_controls_are_always_there() -> None:
    def told(*names: str) -> list[str]:
        return [arm.name for arm in arms(named(*names), [32, 64])]

    controls = ["window at 32", "window at 64", "random at 32", "random at 64"]
    assert told("h2o") == ["dense", "h2o at 32", "h2o at 64", *controls]
    assert told("window", "dense") == ["dense", "window at 32", "window at 64", *controls[2:]]
    assert [arm.name for arm in arms(named("h2o"), [None])] == ["dense", "h2o"]


def test_the_random_control_drops_prompts_only_where_it_must() -> None:
    geometry = ModelGeometry("llama", layers=2, query_heads=4, kv_heads=2, head_dim=24)
    *_, random = arms(named("h2o"), [48])
    assert bound(random, geometry, prompt=40, max_new_tokens=40).policy.name == "random"
    assert bound(random, geometry, prompt=60, max_new_tokens=40).policy.name == "random-unpinned"


def test_a_policy_that_selects_gets_its_budget_as_tokens_read() -> None:
    geometry = ModelGeometry("llama", layers=4, query_heads=4, kv_heads=2, head_dim=24)
    quest = next(arm for arm in arms(named("quest"), [64]) if arm.label == "quest")
    found = bound(quest, geometry, prompt=200, max_new_tokens=40)
    assert found.settings == {"budget": "64"} and found.held == 240 and selects(found.plan)
    assert leaves_unread(found.plan, 200, 40) and not leaves_unread(found.plan, 40, 10)
    h2o = next(arm for arm in arms(named("h2o"), [64]) if arm.label == "h2o")
    assert not selects(bound(h2o, geometry, prompt=200, max_new_tokens=40).plan)


def test_a_policy_that_only_cuts_prompts_gets_what_is_left_or_the_budget_as_its_prompts() -> None:
    geometry = ModelGeometry("llama", layers=2, query_heads=4, kv_heads=2, head_dim=24)
    snapkv = next(arm for arm in arms([("snapkv", load_policy("snapkv"), {"window": "8"})], [64]) if arm.budget)
    left = bound(snapkv, geometry, prompt=200, max_new_tokens=21)
    assert left.settings["budget"] == "43" and left.held == 64
    long = bound(snapkv, geometry, prompt=200, max_new_tokens=101)
    assert long.settings["budget"] == "64" and long.held == 165


def test_why_a_policy_that_does_nothing_on_a_model_is_refused(tiny: tuple[Any, Any]) -> None:
    """Quest leaves the first two layers whole, and builtin:tiny has no others."""
    made = run(tiny, arms(named("quest"), [48]), count=1, new_tokens=8)
    reason = made.refused["phrase", "quest", 48]
    assert reason == (
        "quest drops nothing and leaves nothing unread in each of the 2 layers of this model, so no budget reaches it"
    )


def test_rows_of_another_run_count_and_are_copied(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    of, options = arms(named("h2o"), [30]), {"count": 1, "new_tokens": 4}
    before = run(tiny, of, **options)
    path = tmp_path / "rows.jsonl"
    made = Run(*tiny, "builtin:tiny", Options(size=60, **options), path, known=before.rows[:2])  # type: ignore[arg-type]
    made.run(of, [PHRASE])
    assert made.taken_up == 2 and {row.key for row in read(path)} == {row.key for row in before.rows}


def test_a_policy_that_cannot_hold_a_budget_is_named(tiny: tuple[Any, Any]) -> None:
    made = run(tiny, arms(named("raas"), [48]), count=1, new_tokens=8)
    assert "makes it hold 48 tokens" in made.refused["phrase", "raas", 48]
    assert set(by_arm(made.rows)) == {("dense", None), ("window", 48), ("random-unpinned", 48)}


def test_texts_that_make_no_sense_are_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="no tokens for the words of the task passkey"):
        run(tiny, arms([], []), task_named("passkey"), size=100)
    with pytest.raises(ModelError, match="this model knows 65536 positions"):
        run(tiny, arms([], []), new_tokens=70_000)


# Going on -----------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    path, of = tmp_path / "rows.jsonl", arms(named("h2o"), [30])
    options = {"count": 2, "batch": 1, "new_tokens": 4}
    made = Run(*tiny, "builtin:tiny", Options(size=60, **options), path)  # type: ignore[arg-type]

    def stop(done: int, total: int, what: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    made.tell = stop
    with pytest.raises(KeyboardInterrupt):
        made.run(of, [PHRASE])
    assert len(read(path)) == 3
    again = run(tiny, of, path=path, **options)
    assert again.taken_up == 3 and len(again.rows) == len(read(path)) == 8
    whole = run(tiny, of, **options)
    assert {row.key: row for row in again.rows} == {row.key: row for row in whole.rows}
    other = run(tiny, of, path=path, seed=1, **options)
    assert other.taken_up == 0


@pytest.fixture(autouse=True)
def _left_as_it_was(tiny: tuple[Any, Any]) -> Iterator[None]:
    yield
    assert "kv_policy" not in tiny[0].config.to_dict()
