"""Simulations beside small cases that were worked out by hand, and the grid and drawings that show them."""

import re

import numpy as np
import pytest

from kvpolicy.errors import UsageError
from kvpolicy.lab import drawing
from kvpolicy.lab.chart import HIGH, WIDE, chart, image
from kvpolicy.lab.grid import edges, rows, sampled
from kvpolicy.lab.palette import SHADES
from kvpolicy.lab.simulation import GONE, KEPT, MISSED, UNSAID, Runs, Simulation, held, simulate
from kvpolicy.lab.web_page import page
from kvpolicy.language import load_policy, loads_policy
from kvpolicy.testing.feeding import OracleAlone, plan_for, watch
from kvpolicy.testing.patterns import synthesize

UNIFORM = {"pattern": "uniform", "prompt": 6, "steps": 10, "noise": 0, "layers": 1, "heads": 2, "kv_heads": 1}


def run(pools: str, **attention: object) -> Simulation:
    policy = loads_policy(f"kvpolicy: 1\nname: test\npools:\n  {pools}\n")
    return simulate(policy, synthesize({**UNIFORM, **attention}))


# Numbers


def test_a_window_on_uniform_attention_by_hand() -> None:
    """Four of the n tokens said stay; a fifth is still attended in the pass that drops it."""
    course = run("all: {admit: all, budget: 4}").shown
    assert course.t.tolist() == list(range(11))
    assert course.newest.tolist() == list(range(5, 16))
    assert course.resident.tolist() == [[4] * 11]
    assert course.budget.tolist() == [[4.0] * 11]
    assert course.evicted.tolist() == [2] + [1] * 10
    assert course.updated.all()
    assert course.mass.tolist() == pytest.approx([1] + [5 / said for said in range(7, 17)])
    assert course.mean_mass == pytest.approx(sum(5 / said for said in range(7, 17)) / 10)
    assert (course.min_mass, course.worst) == (pytest.approx(5 / 16), 10)
    assert course.losses == ()
    assert course.never_wanted == pytest.approx(1 - course.mean_mass)
    for moment in range(11):
        newest = moment + 5
        expected = [GONE] * (newest - 3) + [held(0, False)] * 4 + [UNSAID] * (10 - moment)
        assert course.states.at(moment, course.length).tolist() == expected


def test_what_is_safe_and_in_which_pool() -> None:
    """A pool without a budget, then one with a window and a first token, which are protected by name."""
    pools = "prompt: {admit: prompt}\n  new: {admit: generated, budget: 5, window: 2, pinned: {first: 1}}"
    course = run(pools, prompt=3, steps=7).shown
    assert (course.pools, course.bounds) == (("prompt", "new"), (3, 5))
    assert course.resident.tolist() == [[3] * 8, [0, 1, 2, 3, 4, 5, 5, 5]]
    assert np.array_equal(course.budget, [[np.nan] * 8, [5] * 8], equal_nan=True)
    safe, ranked = held(1, True), held(1, False)
    end = [safe, GONE, GONE, ranked, ranked, safe, safe]
    assert course.states.at(7, 10).tolist() == [held(0, True)] * 3 + end
    assert course.evicted.sum() == 2


def test_what_was_wanted_after_it_had_left() -> None:
    """Token 2 is looked at from position 12 on, by e^4 for each other token's 1, and left at position 6."""
    attention = {"pattern": "phoenix", "at": 2, "from": 12, "fade": 0, "level": 4}
    simulation = run("all: {admit: all, budget: 4}", **attention)
    course, [loss] = simulation.shown, simulation.shown.losses
    assert (loss.tokens, loss.left, loss.wanted, loss.times) == ((2,), (1, 1), 7, 4)
    silent, wanted = np.exp(-4), np.exp(4)
    before = [silent / (said - 1 + silent) for said in range(8, 13)]  # as the others are looked at, but for it
    after = [wanted / (said - 1 + wanted) for said in range(13, 17)]
    assert loss.cost == pytest.approx((sum(before) + sum(after)) / 10)
    assert course.never_wanted == pytest.approx(1 - course.mean_mass - loss.cost)
    missed = course.wanted.where(course.wanted.state == MISSED)
    assert (missed.token.tolist(), missed.start.tolist(), missed.stop.tolist()) == ([2], [7], [11])


def test_neighbours_that_are_missed_together_are_one_loss() -> None:
    attention = {"pattern": "phoenix", "at": [1, 2, 4], "from": 12, "fade": 0, "steps": 20}
    losses = run("all: {admit: all, budget: 4}", **attention).shown.losses
    assert sorted(loss.tokens for loss in losses) == [(1, 2), (4,)]
    assert [loss.left for loss in sorted(losses, key=lambda loss: loss.tokens)] == [(0, 1), (3, 3)]


def test_wanted_tokens_that_stay_are_no_loss() -> None:
    course = run("all: {admit: all}", pattern="heavy-hitter", at=3, fade=0, steps=30).shown
    assert course.mass.tolist() == pytest.approx([1.0] * 31)
    assert set(course.wanted.state.tolist()) == {KEPT} and set(course.wanted.token.tolist()) == {3}
    assert not course.losses and not course.evicted.any() and not course.updated.any()


def test_the_states_are_the_oracles_at_every_moment() -> None:
    policy = load_policy("raas", set={"budget": "16", "page_size": "2"})
    said = synthesize({"pattern": "drift", "prompt": 6, "steps": 30, "every": 8})
    simulation = simulate(policy, said)
    courses = {(course.layer, course.row, course.head): course for course in simulation.courses}
    assert len(courses) == 4 and simulation.shown is courses[0, 0, 0]
    moments = dict.fromkeys(courses, -1)
    for seen in watch(OracleAlone(plan_for(policy, said)), said):
        course = courses[seen.place]
        moments[seen.place] += 1
        states = course.states.at(moments[seen.place], course.length)
        assert frozenset(np.flatnonzero(states > GONE).tolist()) == seen.kept()
        assert frozenset(np.flatnonzero(states // 2 == 2).tolist()) == seen.kept("generated")
        assert course.mass[moments[seen.place]] == pytest.approx(seen.full.mass(seen))
    assert simulation.evicted == sum(int(course.evicted.sum()) for course in courses.values()) > 0


def test_totals_are_over_every_head_and_a_place_alone_is_the_same() -> None:
    policy = load_policy("h2o", set={"heavy": "4", "recent": "4"})
    said = synthesize({"pattern": "heavy-hitter", "prompt": [4, 9], "steps": 12, "at": 5, "seen_by": [0, 1]})
    whole = simulate(policy, said)
    assert [(c.layer, c.row, c.head) for c in whole.courses] == [
        (layer, row, head) for layer in range(2) for row in range(2) for head in range(2)
    ]
    assert whole.mean_mass == pytest.approx(np.mean([course.mean_mass for course in whole.courses]))
    assert whole.min_mass == min(course.min_mass for course in whole.courses)
    [alone] = simulate(policy, said, layer=-1, row=1, head=0).courses
    [same] = [c for c in whole.courses if (c.layer, c.row, c.head) == (1, 1, 0)]
    assert alone.mass.tolist() == same.mass.tolist() and alone.losses == same.losses
    assert (alone.prompt, alone.length) == (9, 21)


@pytest.mark.parametrize("place", [{"layer": 2}, {"row": 1}, {"head": -3}])
def test_there_is_no_such_place(place: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"this text has (layer|row|head)s 0\.\."):
        simulate(load_policy("dense"), synthesize({"pattern": "uniform", "steps": 2}), **place)


def test_a_prompt_in_chunks_has_a_moment_for_each() -> None:
    """Chunks are of a row's own tokens: a shorter row has fewer of them."""
    policy = loads_policy("kvpolicy: 1\nname: test\nprompt_chunk: 4\npools:\n  all: {admit: all, budget: 3}\n")
    said = synthesize({"pattern": "uniform", "prompt": [12, 5], "steps": 3})
    long, short = (simulate(policy, said, row=row, layer=0, head=0).shown for row in (0, 1))
    assert long.newest.tolist() == [3, 7, 11, 12, 13, 14]
    assert short.newest.tolist() == [3, 4, 5, 6, 7]
    assert long.t.tolist() == [0, 0, 0, 1, 2, 3]
    assert long.counted.tolist() == [False] * 3 + [True] * 3


def test_a_text_of_a_prompt_alone() -> None:
    course = run("all: {admit: all, budget: 4}", steps=0).shown
    assert course.counted.all() and course.mean_mass == pytest.approx(1) and course.evicted.tolist() == [2]


# Pictures


def test_moments_and_tokens_on_a_coarse_grid() -> None:
    assert sampled(5, 24) == [0, 1, 2, 3, 4]
    assert sampled(101, 5) == [0, 25, 50, 75, 100]
    assert edges(10, 4) == [0, 3, 6, 9, 10]
    attention = {"pattern": "phoenix", "at": 2, "from": 12, "fade": 0}
    course = run("all: {admit: all, budget: 4}", **attention).shown
    first, last = rows(course, [0, 10], edges(course.length, 4))
    assert [cell.pool for cell in first] == [0, 0, None, None]
    assert [cell.share for cell in first] == [0.5, 1.0, 0.0, 0.0]
    assert [cell.said for cell in first] == [True, True, False, False]
    assert [cell.missed for cell in first] == [False] * 4
    assert [cell.missed for cell in last] == [True, False, False, False]  # between the rows as well
    assert [cell.pool for cell in last] == [None, None, None, 0]


def test_the_drawing_has_every_stretch_and_no_other() -> None:
    policy = load_policy("raas", set={"budget": "16", "page_size": "2"})
    course = simulate(policy, synthesize({"pattern": "drift", "prompt": 6, "steps": 40, "every": 8})).shown
    drawn = np.zeros((len(course.t), course.length), dtype=int)
    words = {
        "ranked in pool prompt": 2,
        "safe in pool prompt": 3,
        "ranked in pool generated": 4,
        "safe in pool generated": 5,
    }
    for name, path in re.findall(r'data-state="([^"]*)"[^>]* d="([^"]*)"', drawing.tokens(course, "a")):
        for box in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\d+z", path):
            start, token, wide, high = map(int, box)
            assert not drawn[start : start + wide, token : token + high].any()
            drawn[start : start + wide, token : token + high] = words[name]
    for moment in range(len(course.t)):
        states = course.states.at(moment, course.length)
        assert np.where(states > GONE, states, 0).tolist() == drawn[moment].tolist()


def test_too_many_strokes_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MOST_STROKES", 2)
    starts = np.array([0, 4, 20, 3])
    runs = Runs(np.array([1, 1, 1, 2]), starts, starts + 2, np.full(4, MISSED))
    assert list(drawing._strokes(runs)) == ["M0 1.5H22", "M3 2.5H5"]


def test_pixels_show_the_states() -> None:
    course = run("prompt: {admit: prompt}\n  new: {admit: generated, budget: 4}", prompt=4, steps=12).shown
    pixels = image(course)
    assert pixels.shape == (HIGH, WIDE, 3)

    def colour(token: int, moment: int) -> set[str]:
        row = np.flatnonzero(np.arange(HIGH) * course.length // HIGH == token)
        column = np.flatnonzero(np.arange(WIDE) * len(course.t) // WIDE == moment)
        return {"#" + bytes(pixel).hex() for pixel in pixels[np.ix_(row, column)].reshape(-1, 3)}

    assert colour(15, 0) == {"#ffffff"}
    assert colour(4, 12) == {"#dcdcdc"}
    assert colour(15, 12) == {SHADES[1].ranked}
    assert SHADES[0].safe in colour(0, 6) and len(colour(0, 6)) == 2  # striped


def test_a_png(tmp_path: object) -> None:
    pytest.importorskip("matplotlib")
    simulation = run("all: {admit: all, budget: 4}")
    data = chart([simulation, simulation], "two of a <kind> & $one$")
    assert data.startswith(b"\x89PNG") and len(data) < 150_000


def lightness(colour: str) -> float:
    """Relative luminance, as WCAG defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("shade", SHADES)
def test_safe_and_ranked_differ_without_colour(shade: tuple[str, str]) -> None:
    dark, light = map(lightness, shade)
    assert (light + 0.05) / (dark + 0.05) > 2


def test_thousands_of_tokens_are_a_small_page() -> None:
    said = synthesize({"pattern": "drift", "prompt": 1600, "steps": 400, "layers": 1, "heads": 1, "kv_heads": 1})
    simulation = simulate(load_policy("streaming-llm", set={"window": "60"}), said)
    assert len(page([simulation], "drift")) < 400_000
