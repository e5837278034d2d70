"""Bursts, mixtures and adversaries: what is really attended to, by whom and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kvpolicy.errors import PolicyError
from kvpolicy.language import load_policy, loads_policy
from kvpolicy.language.base import Complaint
from kvpolicy.testing.feeding import OracleAlone, plan_for, watch
from kvpolicy.testing.full_cache import FullCache
from kvpolicy.testing.patterns import Attention, synthesize
from kvpolicy.testing.runner import run_test, run_tests
from tests.testing.kit import policy

TEXT = {"prompt": 16, "steps": 48}


def shares(arguments: Mapping[str, Any], *, row: int = 0, layer: int = 0, head: int = 0) -> np.ndarray:
    """[query, token]: attention in a query head, causal."""
    said = synthesize({**TEXT, **arguments})
    group = said.geometry.group
    query, key = said.queries[row][layer][head].astype(float), said.keys[row][layer][head // group].astype(float)
    scores = query @ key.T * said.scale
    weights = np.where(np.tri(len(scores), dtype=bool), np.exp(scores - scores.max()), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def test_bursts_come_when_they_are_said_to_and_are_silent_between() -> None:
    rows = shares({"pattern": "burst", "at": 5, "times": [24, 40], "width": 3})[:, 5]
    loud = [24, 25, 26, 40, 41, 42]
    assert rows[loud].min() > 0.35
    assert np.delete(rows, [*range(6), *loud])[1:].max() < 0.01


def test_bursts_come_every_so_often() -> None:
    rows = shares({"pattern": "burst", "at": [5, 9], "every": 10, "noise": 0})[:, [5, 9]].sum(axis=1)
    loud = [n for n in range(10, 64) if (n - 9) % 10 in (0, 1) and n >= 19]
    assert loud[:4] == [19, 20, 29, 30] and rows[loud].min() > 0.5
    assert np.delete(rows, [*range(10), *loud]).max() < 0.02
    some = shares({"pattern": "burst", "at": 5})[:, 5] > 0.3
    assert np.flatnonzero(some[6:]).tolist() == [n - 6 for start in (19, 33, 47, 61) for n in (start, start + 1)]


MIXED = {
    "pattern": "mixture",
    "noise": 0,
    "layers": 3,
    "rows": 2,
    "heads": 4,
    "kv_heads": 2,
    "parts": [
        {"pattern": "sink", "sinks": 2, "fade": 0},
        {"pattern": "heavy-hitter", "at": 10, "fade": 0, "where": {"layers": "0..1", "kv_heads": 1, "from": 30}},
        {"pattern": "milestone", "at": 12, "until": 50, "fade": 0, "where": {"heads": 0, "rows": 1, "until": 40}},
    ],
}


def loud(row: int, layer: int, head: int) -> dict[int, list[int]]:
    """Token -> the queries that look at it clearly more than at ordinary text."""
    rows = shares(MIXED, row=row, layer=layer, head=head)
    ordinary = rows[np.arange(64), 15][:, None]
    stands_out = rows > 3 * np.where(ordinary > 0, ordinary, 1)
    return {token: np.flatnonzero(stands_out[16:, token]).tolist() for token in (0, 1, 5, 10, 12)}


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("head", [0, 1, 2, 3])
def test_parts_hold_where_and_when_they_are_said_to(row: int, layer: int, head: int) -> None:
    generated, found = list(range(48)), loud(row, layer, head)
    assert (found[0], found[1], found[5]) == (generated, generated, [])
    assert found[10] == (list(range(30 - 16, 48)) if layer < 2 and head >= 2 else [])
    assert found[12] == (list(range(40 - 16 + 1)) if row == 1 and head == 0 else [])


def test_what_parts_want_of_a_token_adds_up() -> None:
    parts = [
        {"pattern": "heavy-hitter", "at": [3, 5], "fade": 0, "level": 1},
        {"pattern": "sink", "level": 2, "fade": 0},
    ]
    rows = shares({"pattern": "mixture", "parts": parts, "noise": 0})[60]
    assert rows[[3, 5, 0, 9]] / rows[9] == pytest.approx(np.exp([3, 1, 2, 0]), rel=1e-4)


def test_a_mixture_of_one_is_the_pattern_itself() -> None:
    alone = synthesize({**TEXT, "pattern": "drift", "every": 10, "seed": 3})
    mixed = synthesize({**TEXT, "pattern": "mixture", "parts": [{"pattern": "drift", "every": 10}], "seed": 3})
    for what in ("queries", "keys", "values"):
        assert np.array_equal(getattr(alone, what)[0], getattr(mixed, what)[0])


def test_mixtures_nest_and_fade_and_hush_where_they_are() -> None:
    inner = {"pattern": "mixture", "parts": [{"pattern": "ties", "where": {"heads": [0, 1]}}], "where": {"from": 32}}
    said = synthesize({**TEXT, "pattern": "mixture", "parts": [inner, {"pattern": "local", "where": {"heads": 3}}]})
    scores = (
        said.queries[0][0].astype(float) @ np.repeat(said.keys[0][0].astype(float), 2, 0).swapaxes(1, 2) * said.scale
    )
    whole = np.abs(scores - scores.round()) < 1e-5
    assert whole[:2, 32:].all() and not whole[:2, :32].any(axis=-1).all() and not whole[2, 32:].all()
    rows = shares({"pattern": "mixture", "parts": [{"pattern": "local", "where": {"heads": 3}}], "noise": 0}, head=3)
    assert rows[60, 40] < rows[60, 59] / 3
    even = shares({"pattern": "mixture", "parts": [{"pattern": "local", "where": {"heads": 3}}], "noise": 0}, head=2)
    assert np.ptp(even[60, :61]) < 1e-6


WINDOW = "all: {admit: all, budget: 8}"


def against(pools: str, **arguments: Any) -> Attention:
    made = policy(pools, "{keeps: all}")
    return synthesize({**TEXT, "pattern": "adversarial", **arguments}, lambda said: plan_for(made, said))


def test_an_adversary_wants_what_a_window_has_just_dropped() -> None:
    said = against(WINDOW, width=2, noise=0, fade=0)
    full = FullCache(said)
    assert np.allclose(np.linalg.norm(said.keys[0], axis=-1), 1, atol=1e-6)
    for newest in range(16, 64):  # before the token at n attends, a window of 8 has lost all up to n - 9
        weights = full.probabilities(1, 0, 1, newest)
        wanted = [newest - 10, newest - 9]
        assert sorted(np.argsort(weights)[-2:]) == wanted and weights[wanted].sum() > 0.55
        assert np.ptp(np.delete(weights, wanted)) < 1e-6
    assert np.ptp(full.probabilities(1, 0, 1, 15)) < 1e-6  # a prompt's queries come before anything is dropped


H2O = "all: {admit: all, budget: 8, window: 2, scorer: {signal: attention, queries: all, memory: sum}}"


@pytest.mark.parametrize(
    "pools", [WINDOW, H2O, "all: {admit: all, budget: 9, page: 2, window: 2, scorer: {signal: page-bound}}"]
)
def test_it_makes_its_own_policy_regret_most(pools: str) -> None:
    """Each KV head loses tokens of its own, and misses them; a policy that it was not made against fares better."""
    said = against(pools, width=3, level=5, prompt=[16, 9])

    def mass(kept_by: str) -> np.ndarray:
        plan = plan_for(policy(kept_by, "{keeps: all}"), said)
        seen = [(each.place, each.full.mass(each)) for each in watch(OracleAlone(plan), said) if each.newest > 30]
        places = [(0, row, head) for row in (0, 1) for head in (0, 1)]
        return np.array([np.mean([share for at, share in seen if at == place]) for place in places])

    own = mass(pools)
    assert own.max() < 0.2
    others = [
        mass(each).mean()
        for each in ("all: {admit: all, budget: 24}", "all: {admit: all, budget: 8, scorer: {signal: random}}")
    ]
    assert min(others) > own.mean() + 0.02


def test_it_is_decided_by_the_seed_and_by_the_policy() -> None:
    one, same, other = against(H2O), against(H2O), against(H2O, seed=5)
    assert np.array_equal(one.queries[0], same.queries[0]) and not np.array_equal(one.queries[0], other.queries[0])
    assert not np.array_equal(one.queries[0], against(WINDOW).queries[0])
    assert np.array_equal(one.keys[0], against(WINDOW).keys[0])


def test_only_those_who_see_it_are_adversaries() -> None:
    said = against(WINDOW, seen_by=[1], noise=0, fade=0)
    scores = said.queries[0][0] @ np.repeat(said.keys[0][0], 2, 0).swapaxes(1, 2) * said.scale
    assert (np.ptp(scores[1, 17:], axis=-1) > 3).all() and (np.ptp(scores[[0, 2, 3]], axis=-1) < 1e-5).all()


def test_an_adversary_may_be_a_part_of_a_mixture() -> None:
    parts = [{"pattern": "sink", "fade": 0}, {"pattern": "adversarial", "where": {"layers": 1, "from": 40}, "fade": 0}]
    said = against(WINDOW, pattern="mixture", parts=parts, noise=0)
    full = FullCache(said)
    assert full.probabilities(0, 0, 0, 50)[:4].sum() > 0.9 and full.probabilities(1, 0, 0, 39)[:4].sum() > 0.9
    late = full.probabilities(1, 0, 0, 50)
    assert late[38:42].sum() > 0.2 and late[:4].sum() > 0.6 and late[30:38].max() < 0.01


@pytest.mark.parametrize("runtime", [False, True])
def test_in_a_tests_block_it_works_against_that_policy(runtime: bool) -> None:
    text = "{pattern: adversarial, prompt: 16, steps: 40, width: 2}"
    made = policy(H2O, "{mass: {max: 0.5, from: 20}}, {mass: {mean: 0.3, from: 20}}", text)
    outcome = run_test(made, 0, runtime=runtime)
    assert [failure.claim for failure in outcome.failures] == [1]
    dense = run_tests(loads_policy(made.to_yaml().replace("budget: 8", "budget: 30")))
    assert [failure.claim for failure in dense[0].failures] != []


def where(places: Any) -> dict[str, Any]:
    return {"pattern": "sink", "where": places}


def part_of(part: dict[str, Any]) -> dict[str, Any]:
    return {"pattern": "mixture", "parts": [{"pattern": "sink"}, part]}


WRONG_PARTS: list[tuple[dict[str, Any], str, tuple[str | int, ...], str]] = [
    ({"pattern": "sinc"}, "no pattern is called `sinc`", ("pattern",), "did you mean `sink`?"),
    ({"pattern": "sink", "level": "high"}, "`high` is not a number", ("level",), ""),
    ({"pattern": "milestone", "at": 3}, "the argument `until` is missing", (), ""),
    ({"pattern": "milestone", "at": 9, "until": 3}, "at 3 the milestone 9 has not been said", ("until",), ""),
    ({"pattern": "sink", "steps": 3}, "`steps` is said once, for all parts", ("steps",), "beside `parts`"),
    ({"pattern": "sink", "noise": 0}, "`noise` is said once, for all parts", ("noise",), ""),
    ({"pattern": "sink", "layers": 0}, "`layers` of a part is said under `where`", ("layers",), "{layers: 0}"),
    ({"pattern": "sink", "from": 9}, "`from` of a part is said under `where`", ("from",), "{from: 9}"),
    (where(3), "`where` is a mapping", ("where",), "as in `where: "),
    (where({"layer": 3}), "`layer` is not an argument here", ("where", "layer"), "`layers`"),
    (where({"layers": 2}), "the layers are 0..1", ("where", "layers"), ""),
    (where({"heads": [0, 4]}), "the heads are 0..3", ("where", "heads"), ""),
    (where({"kv_heads": 2}), "the KV heads are 0..1", ("where", "kv_heads"), ""),
    (where({"rows": 1}), "the rows are 0..0", ("where", "rows"), ""),
    (where({"from": 64}), "position 64 is never said", ("where", "from"), "0..63"),
    (where({"from": 9, "until": 8}), "from 9 until 8 is no time", ("where", "until"), ""),
    (where({"heads": 0, "kv_heads": 1}), "none of these `heads` belongs", ("where", "heads"), ""),
    ({"pattern": "adversarial"}, "there is no policy to work against here", ("pattern",), "`tests:`"),
    ({"pattern": "mixture", "parts": [{"pattern": "sinc"}]}, "no pattern is called", ("parts", 0, "pattern"), ""),
]  # fmt: skip

WRONG: list[tuple[dict[str, Any], str, tuple[str | int, ...], str]] = [
    ({"pattern": "burst", "at": 5, "every": 9, "times": [20]}, "`times` and `every` both say when", ("every",), "drop"),
    ({"pattern": "burst", "at": 5, "every": 2}, "a burst of 2 every 2 is never silent", ("every",), "above `width`"),
    ({"pattern": "burst", "at": 5, "width": 0}, "a burst lasts a query at least", ("width",), ""),
    ({"pattern": "burst", "at": [5, 9], "times": 9}, "at 9, 5, 9 has not been said", ("times",), "above 9"),
    ({"pattern": "burst", "at": 5, "times": 80}, "position 80 is never said", ("times",), ""),
    ({"pattern": "mixture"}, "the argument `parts` is missing", (), "known here: `parts`"),
    ({"pattern": "mixture", "parts": []}, "a mixture has a list of parts", ("parts",), "as in `parts: "),
    ({"pattern": "mixture", "parts": {"pattern": "sink"}}, "a mixture has a list of parts", ("parts",), ""),
    ({"pattern": "mixture", "parts": ["sink"]}, "a part names a `pattern`", ("parts", 0), ""),
    ({"pattern": "mixture", "at": 3, "parts": [{"pattern": "sink"}]}, "`at` is not an argument here", ("at",), ""),
    *[(part_of(part), reason, ("parts", 1, *path), hint) for part, reason, path, hint in WRONG_PARTS],
    ({"pattern": "adversarial"}, "there is no policy to work against here", ("pattern",), "in the `tests:` of one"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "reason", "path", "hint"), WRONG, ids=[f"{p} {r}" for _, r, p, _ in WRONG])
def test_what_makes_no_sense_is_named(
    arguments: dict[str, Any], reason: str, path: tuple[str | int, ...], hint: str
) -> None:
    with pytest.raises(Complaint) as caught:
        synthesize({**TEXT, **arguments})
    assert caught.value.reason.startswith(reason)
    assert caught.value.path == path
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("pools", "attention", "reason", "culprit"),
    [
        ("all: {admit: all}", "{pattern: adversarial}", "this policy drops nothing of this text", "adversarial"),
        ("all: {admit: all, budget: 99}", "{pattern: adversarial}", "this policy drops nothing", "adversarial"),
        (WINDOW, "{pattern: adversarial, width: 0}", "an adversary wants a token at least", "0"),
        (WINDOW, "{pattern: adversarial, level: x}", "`x` is not a number", "x"),
        (
            WINDOW,
            "{pattern: mixture, parts: [{pattern: sink}, {pattern: drift, where: {layers: 7}}]}",
            "the layers are 0..1",
            "7",
        ),
    ],
)
def test_mistakes_are_shown_at_their_place(pools: str, attention: str, reason: str, culprit: str) -> None:
    with pytest.raises(PolicyError) as caught:
        run_test(policy(pools, "{keeps: 3}", attention), 0)
    (mistake,) = caught.value.diagnostics
    assert mistake.reason.startswith(reason)
    assert mistake.snippet[mistake.column - 1 :][: mistake.width] == culprit


def test_shipped_policies_can_be_worked_against() -> None:
    raas = load_policy("raas", set={"budget": 32, "page_size": 4})
    said = synthesize({**TEXT, "pattern": "adversarial", "layers": 1}, lambda text: plan_for(raas, text))
    plan = plan_for(raas, said)
    shares = [seen.full.mass(seen) for seen in watch(OracleAlone(plan), said) if seen.newest > 50]
    assert max(shares) < 0.7
