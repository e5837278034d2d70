"""Tasks of reasoning-gym: its problems, its checkers, and what is said where it is not installed."""

import pytest

from kvpolicy.cli.main import main
from kvpolicy.errors import MissingExtra, UsageError
from kvpolicy.lab.tasks import gym
from kvpolicy.lab.tasks.base import Item
from kvpolicy.lab.tasks.registry import task_named


def test_without_the_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    gym.gym_task.cache_clear()
    with pytest.raises(MissingExtra, match="kvpolicy\\[reasoning\\]"):
        task_named("gym:chain_sum")
    assert main(["compare", "h2o", "--tasks", "gym:chain_sum"]) == 5
    assert "pip install 'kvpolicy[reasoning]'" in capsys.readouterr().err


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("reasoning_gym", reason="needs kvpolicy[reasoning]")
        gym.gym_task.cache_clear()

    @staticmethod
    def output(item: Item, answers: dict[str, str]) -> str:
        return "".join(f"Answer_{name}:\nLet me see.\nThe answer is {answers[name]}.\n\n" for name in answers)

    @pytest.mark.parametrize("name", ["gym:chain_sum", "gym:leg_counting", "gym:word_sorting"])
    def test_right_outputs_are_right_and_others_wrong(self, name: str) -> None:
        task = task_named(name)
        one, other = task.make(2, seed=3)
        assert task.make(2, seed=3) == [one, other] and task.make(1, seed=4)[0] != one
        assert len(one.names) > 1 and len(one.prompt.split()) < task.size + 60
        told = dict(zip(one.names, one.answers, strict=True))
        assert all(task.grade(one, self.output(one, told)))
        backwards = dict(reversed(told.items()))
        assert all(task.grade(one, self.output(one, backwards))) and task.finished(one, self.output(one, told))
        assert not any(task.grade(one, "")) and not any(task.grade(one, "I do not know."))
        first = one.names[0]
        assert task.grade(one, self.output(one, told | {first: "7 apples"})) == (False, *[True] * (len(told) - 1))
        shuffled = dict(zip(one.names, other.answers, strict=False))
        assert sum(task.grade(one, self.output(one, shuffled))) <= len(told) // 2

    def test_an_unknown_data_set_is_refused(self) -> None:
        with pytest.raises(UsageError, match="did you mean gym:chain_sum"):
            task_named("gym:chainsum")
