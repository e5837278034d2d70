"""The rule by which claims are judged: intervals of paired differences, and what several places say together."""

import math
import random
from statistics import mean

import pytest

from kvpolicy.lab.suites.claims import Kind, Spread, Word, _student, all_of, any_of, counted, judge, spread


@pytest.mark.parametrize(
    ("kind", "low", "high", "word"),
    [
        (Kind.ABOVE, 0.01, 0.2, Word.HOLDS),
        (Kind.ABOVE, -0.01, 0.2, Word.OPEN),
        (Kind.ABOVE, -0.2, 0.0, Word.FAILS),
        (Kind.NEAR, -0.03, 0.5, Word.HOLDS),
        (Kind.NEAR, -0.04, 0.02, Word.OPEN),
        (Kind.NEAR, -0.2, -0.031, Word.FAILS),
        (Kind.BELOW, -0.2, -0.031, Word.HOLDS),
        (Kind.BELOW, -0.2, 0.1, Word.OPEN),
        (Kind.BELOW, -0.03, 0.1, Word.FAILS),
    ],
)
def test_the_whole_interval_must_lie_on_one_side(kind: Kind, low: float, high: float, word: Word) -> None:
    assert judge(kind, Spread((low + high) / 2, low, high, 9)) is word


def test_places_together() -> None:
    holds, fails, unknown = Word.HOLDS, Word.FAILS, Word.OPEN
    assert all_of([holds, holds]) is holds and all_of([holds, unknown]) is unknown
    assert all_of([unknown, fails, holds]) is fails and all_of([]) is unknown
    assert any_of([fails, holds]) is holds and any_of([fails, unknown]) is unknown and any_of([fails]) is fails
    assert any_of([]) is unknown
    assert counted([holds, unknown, holds], "budgets") == "holds at 2, cannot be told at 1 of 3 budgets"


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.776), (9, 2.262), (15, 2.131), (63, 1.998)])
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert _student(freedom) == pytest.approx(quantile, rel=0.01)


def test_intervals_hold_the_true_difference_as_often_as_they_say() -> None:
    """Items of eight answers, right 80 and 70 times of a hundred."""
    rng = random.Random(0)

    def share(right: float) -> float:
        return mean(rng.random() < right for _ in range(8))

    held = 0
    for _ in range(600):
        found = spread([share(0.8) for _ in range(16)], [share(0.7) for _ in range(16)], 8)
        held += found.low <= 0.1 <= found.high
    assert 0.93 < held / 600 < 0.975


def test_equal_items_still_have_an_interval() -> None:
    found = spread([1.0] * 16, [1.0] * 16, 10)
    assert found.difference == 0 and found.high == -found.low == pytest.approx(_student(15) / 10 / 16)
    assert spread([1.0, 0.0], [0.0, 0.0], 1).low == -1.0 and math.isclose(spread([1.0, 0.0], [0.0, 0.0], 1).high, 1.0)
    with pytest.raises(ValueError, match="1 items"):
        spread([1.0], [1.0], 1)
