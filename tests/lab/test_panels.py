"""What pictures have in common: how high a number is drawn, and what stands beside it."""

from __future__ import annotations

import pytest

from kvpolicy.lab.panels import Axis


def test_shares_are_told_in_percent_from_nothing_to_all() -> None:
    axis = Axis()
    assert [axis.part(value) for value in (0, 0.3, 1)] == pytest.approx([0, 0.3, 1])
    assert axis.marks == [(0, "0 %"), (0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %"), (1, "100 %")]


@pytest.mark.parametrize(("least", "bottom"), [(0.0, "0 %"), (0.39, "20 %"), (0.87, "80 %"), (1.0, "80 %")])
def test_shares_that_are_all_high_stand_apart(least: float, bottom: str) -> None:
    axis = Axis.of_shares(least)
    assert axis.marks[0] == (0, bottom) and axis.marks[-1] == (1, "100 %")
    assert 0 <= axis.part(least) <= 1


def test_each_power_of_ten_is_as_high_as_any_other() -> None:
    axis = Axis.decades(3e-4, 0.5)
    assert axis.marks == [(pytest.approx(number / 4), f"{10.0 ** (number - 4):g}") for number in range(5)]
    assert axis.part(1e-5) == axis.part(0) == 0, "what lies below is drawn at the bottom"
    assert [words for _, words in Axis.decades(0.01, 0.01).marks] == ["0.01", "0.1"]


def test_other_numbers_go_from_nothing_to_the_top() -> None:
    axis = Axis(top=2.5, shares=False)
    assert axis.part(1) == pytest.approx(0.4) and [words for _, words in axis.marks][-2:] == ["1.88", "2.5"]
