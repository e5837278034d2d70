"""Which params are searched and where, what candidates come to, and what is asked of the model next. No torch."""

from collections.abc import Sequence
from fractions import Fraction

import pytest

from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.budgets import sizes_of
from kvpolicy.lab.fidelity.summary import Estimate
from kvpolicy.lab.tune.candidates import Candidate, Draw, Drawer, levels
from kvpolicy.lab.tune.goal import Goal, Tried, front, rank_correlation, to_measure
from kvpolicy.lab.tune.measured import Measured
from kvpolicy.lab.tune.sizing import Lengths, Sized, Sizer
from kvpolicy.lab.tune.space import space
from kvpolicy.lab.tune.traced import Kept, spread
from kvpolicy.language import load_policy
from kvpolicy.plan import ModelGeometry, make_plan

SHAPE = ModelGeometry("synthetic", 3, 4, 2, 8)
LENGTHS = Lengths((40, 60), 100)


def sizer(name: str, **params: object) -> Sizer:
    policy = load_policy(name)
    return Sizer(policy.bind(**params) if params else policy, SHAPE, LENGTHS)


@pytest.mark.parametrize("name", ["h2o", "raas", "pyramidkv", "scope-adaptive", "duo-attention"])
def test_bytes_are_those_of_a_plan_of_all_layers(name: str) -> None:
    """Also where one layer stands for all, and where layers differ."""
    sized = sizer(name)({})
    plan = make_plan(load_policy(name), SHAPE, prompt=LENGTHS.prompt, max_new_tokens=LENGTHS.new_tokens)
    assert sized is not None
    assert (sized.bytes, sized.idle) == (plan.bytes, plan.never_fires)
    assert sizer(name).full == plan.dense_bytes


def test_the_language_says_what_a_param_may_be() -> None:
    found = {axis.name: axis for axis in space(sizer("r-kv"), {}).axes}
    assert found["budget"].size and not found["kernel"].size
    assert all(value % 2 == 1 for value in found["kernel"].values)
    assert (found["mix"].kind, found["window"].kind) == ("number", "whole")
    assert max(found["window"].values) <= LENGTHS.whole
    kivi = {axis.name: axis.values for axis in space(sizer("kivi"), {}).axes}
    assert kivi["bits"] == (2, 4, 8)
    raas = {axis.name: axis for axis in space(sizer("raas", budget=150), {}).axes}
    assert raas["touch"].kind == "share" and raas["touch"].spelled(Fraction(3, 20)) == "15%"
    assert max(raas["touch"].values) == 1


def test_a_size_is_searched_where_only_large_ones_fit() -> None:
    """RaaS needs two pages of 16 beside a prompt of 16: more than this text of 40 tokens has."""
    sizes = Sizer(load_policy("raas"), SHAPE, Lengths((16, 16), 24))
    found = space(sizes, {})
    assert [axis.name for axis in found.sizes] == ["budget"]
    assert Drawer(found, sizes, 0).least().settings["budget"] != "1024"


def test_params_that_are_set_or_are_luck_stay() -> None:
    found = space(sizer("keyformer"), {"recent": "5"})
    assert {axis.name for axis in found.axes} == {"budget", "temperature", "growth"}
    assert found.left["recent"] == "set to 5" and found.left["seed"].startswith("luck")
    assert [axis.name for axis in space(sizer("keyformer"), {}, ["seed"]).axes] == ["seed"]


@pytest.mark.parametrize(
    ("name", "given", "only", "said"),
    [
        ("dense", {}, [], "no params"),
        ("h2o", {}, ["heavi"], "--only heavi: h2o has no such param; did you mean `heavy`"),
        ("h2o", {"heavy": "4"}, ["heavy"], "--only asks to search heavy and --set fixes it"),
        ("h2o", {"heavy": "4", "recent": "4"}, [], "no param left to search"),
    ],
)
def test_what_cannot_be_searched_is_told(name: str, given: dict[str, str], only: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        space(sizer(name), given, only)


@pytest.mark.parametrize("name", ["h2o", "scope-slide", pytest.param("raas-compressed-prompt", marks=pytest.mark.slow)])
def test_candidates_come_to_the_memory(name: str) -> None:
    sizes = sizer(name)
    drawer = Drawer(space(sizes, {}), sizes, 0)
    target = round(0.8 * sizes.full)
    found = [drawer.proportions(target), *(drawer.drawn(target) for _ in range(3))]
    there = [candidate for candidate in found if candidate is not None]
    assert len(there) >= 3
    assert all(0.85 * target <= candidate.bytes <= target for candidate in there)
    assert len({candidate.policy.digest for candidate in there}) == len(there)
    least = drawer.least()
    assert least.bytes < min(candidate.bytes for candidate in there)
    assert sizes(least.settings) == least.sized
    assert drawer.drawn(least.bytes - 1) is None
    assert drawer.most() > max(candidate.bytes for candidate in there)


def test_equal_seeds_draw_alike() -> None:
    def draws(seed: int) -> list[dict[str, str]]:
        sizes = sizer("scope-slide")
        drawer = Drawer(space(sizes, {"alpha2": "4", "beta2": "8"}), sizes, seed)
        first = [drawer.drawn(25_000) for _ in range(2)]
        near = [candidate for candidate in first if candidate is not None]
        return [each.settings for each in (*near, drawer.drawn(25_000, near)) if each is not None]

    assert draws(1) == draws(1) != draws(2)


def test_what_the_user_set_is_in_every_candidate() -> None:
    sizes = sizer("h2o")
    drawer = Drawer(space(sizes, {"recent": "6"}), sizes, 0)
    found = drawer.proportions(20_000)
    assert found is not None and found.settings["recent"] == "6"


def test_levels_and_layers_are_spread() -> None:
    assert list(levels(100, 400, 3)) == [100, 200, 400]
    assert spread(range(30), 3) == (5, 15, 25)
    assert spread((1, 4), 3) == (1, 4)


def test_sizes_of_a_policy() -> None:
    found = sizes_of(load_policy("scope-slide"), SHAPE, prompt=60, max_new_tokens=100, given={"beta2": "8"})
    assert set(found) == {"alpha", "beta1"}


# What is chosen --------------------------------------------------------------------------------------------------


def tried(number: int, size: int, error: float, agreement: float | None = None) -> Tried:
    policy = load_policy("window")
    candidate = Candidate(number, Draw(), {}, Sized(policy, size, False))
    found = Tried(candidate, Kept(error, 1 - error, 9))
    if agreement is not None:
        run(found, agreement)
    return found


def run(each: Tried, agreement: float) -> None:
    exactly = Estimate(agreement, agreement, agreement)
    each.measured = Measured(exactly, Estimate(1 - agreement, 0, 1), each.bytes, 5, 100, 2)


def test_the_front_is_what_nothing_beats() -> None:
    found = [tried(0, 10, 0, 0.5), tried(1, 20, 0, 0.5), tried(2, 20, 0, 0.9), tried(3, 30, 0, 0.8), tried(4, 40, 0, 1)]
    assert [each.candidate.number for each in front(found)] == [0, 2, 4]


def test_the_choice_is_the_best_that_fits() -> None:
    found = [tried(0, 10, 0, 0.5), tried(1, 20, 0, 0.95), tried(2, 20, 0, 0.9), tried(3, 30, 0, 0.99)]
    for goal, number in (
        (Goal(memory=25), 1),
        (Goal(memory=9), None),
        (Goal(agreement=0.9), 1),
        (Goal(agreement=1), None),
    ):
        chosen = goal.chosen(found)
        assert (chosen and chosen.candidate.number) == number


def measure(goal: Goal, found: Sequence[Tried], first: Sequence[Tried], count: int) -> list[int]:
    """The numbers of those that are measured; each agrees as its error says."""
    asked = []
    for each in to_measure(goal, found, first, count, seed=0):
        run(each, 1 - each.promise)
        asked.append(each.candidate.number)
    return asked


def test_within_a_memory_the_promising_run_and_some_others() -> None:
    found = [tried(number, 10, number / 20) for number in range(20)]
    asked = measure(Goal(memory=10), found, [found[7]], 8)
    assert asked[:6] == [7, 0, 1, 2, 3, 4]
    assert len(set(asked)) == 8


def test_for_an_agreement_memories_are_halved() -> None:
    """Of 64 memories the least that does is found in few runs."""
    found = [tried(number, 100 * (number + 1), (63 - number) / 100) for number in range(64)]
    asked = measure(Goal(agreement=0.8), found, [], 10)
    chosen = Goal(agreement=0.8).chosen([each for each in found if each.measured is not None])
    assert chosen is not None and chosen.candidate.number == 43
    assert len(asked) == len(set(asked)) <= 10


def test_between_what_fails_and_what_fits_more_are_drawn() -> None:
    """The least that does lies at 300, and nothing was tried between 100 and 1,000; what is hopeless never runs."""
    found = [tried(0, 100, 0.9), tried(1, 50, 0.95), tried(2, 1000, 0.1)]

    def more(target: int) -> list[Tried]:
        found.append(tried(len(found), target, 0.1 if target >= 300 else 0.5))
        return found[-1:]

    goal = Goal(agreement=0.9)
    for each in to_measure(goal, found, [], 20, 0, more):
        run(each, 1 - each.promise)
    chosen = goal.chosen([each for each in found if each.measured is not None])
    assert chosen is not None and 300 <= chosen.bytes <= 320
    assert found[1].measured is None
    assert sum(each.measured is not None for each in found) < 10


def test_ranks_are_compared() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 7, 5, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2], [5, 5, 6]) == pytest.approx(1)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
