"""Synthetic attention: real queries and keys that attend as was asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kvpolicy.language import load_policy
from kvpolicy.language.base import Complaint
from kvpolicy.plan import Plan
from kvpolicy.testing.feeding import plan_for
from kvpolicy.testing.patterns import PATTERNS, Attention, Scene
from kvpolicy.testing.patterns import synthesize as draw

NEEDED: dict[str, dict[str, Any]] = {
    "heavy-hitter": {"at": [3, 30]},
    "milestone": {"at": 20, "until": 40},
    "phoenix": {"at": 5, "from": 40},
    "needle": {"at": "4..6"},
    "burst": {"at": 5, "times": [24, 40], "width": 3},
    "short-keys": {"at": [3, 30]},
    "mixture": {"parts": [{"pattern": "sink", "sinks": 2}, {"pattern": "burst", "at": 20, "where": {"from": 30}}]},
}
"""Arguments without which a pattern cannot be drawn."""

TEXT = {"prompt": 16, "steps": 48}
ARGUMENTS = {name: {"pattern": name, **TEXT, **NEEDED.get(name, {})} for name in PATTERNS}


def window(said: Attention) -> Plan:
    return plan_for(load_policy("window").bind(window=6), said)


def synthesize(arguments: Mapping[str, Any]) -> Attention:
    """Against the window policy, where a pattern asks for one."""
    return draw(arguments, window)


def logits(said: Attention, row: int = 0, layer: int = 0) -> np.ndarray:
    """[Q, query, token] scaled logits, those of later tokens included."""
    queries, keys = said.queries[row][layer].astype(float), said.keys[row][layer].astype(float)
    keys = np.repeat(keys, len(queries) // len(keys), axis=0)
    return queries @ keys.swapaxes(1, 2) * said.geometry.head_dim**-0.5


def shares(name: str, **arguments: Any) -> np.ndarray:
    """[query, token]: attention in the first head, causal."""
    scores = logits(synthesize({**ARGUMENTS[name], **arguments}))[0]
    weights = np.where(np.tri(len(scores), dtype=bool), np.exp(scores - scores.max()), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def wanted(name: str) -> np.ndarray:
    """The logits that a pattern asks for, by its own words."""
    scene = Scene(**TEXT, random=np.random.default_rng([0, 0, 0]))
    given = {"at": (20,), "until": 40, "from_": 60} if name in NEEDED else {}
    at = PATTERNS[name].__annotations__
    PATTERNS[name](scene, **{key: value for key, value in given.items() if key in at})
    return scene.wanted()


ALONE = [name for name in PATTERNS if name not in ("mixture", "adversarial")]
"""Patterns that can be drawn without others and without a policy."""


@pytest.mark.parametrize("name", ALONE)
def test_keys_have_length_1_and_meet_queries_as_wanted(name: str) -> None:
    arguments = {"at": 20, "until": 40, "from": 60} if name in NEEDED else {}
    arguments = {key: value for key, value in arguments.items() if key in NEEDED.get(name, {})}
    said = synthesize({"pattern": name, **TEXT, **arguments, "noise": 0})
    assert name == "short-keys" or np.allclose(np.linalg.norm(said.keys[0], axis=-1), 1, atol=1e-6)
    assert all(array.dtype == np.float32 for array in (*said.queries, *said.keys, *said.values))
    for head in logits(said):
        assert np.abs(head - wanted(name)).max() < 2e-5


def test_short_keys_are_short_in_the_heads_that_are_meant_and_no_query_notices() -> None:
    part = {"pattern": "short-keys", "at": [3, 30], "spread": 3, "where": {"kv_heads": 1}}
    said = synthesize({"pattern": "mixture", **TEXT, "parts": [part], "noise": 0})
    lengths = np.linalg.norm(said.keys[0][0], axis=-1)
    short = np.zeros_like(lengths, dtype=bool)
    short[1, [3, 30]] = True
    assert ((lengths >= 1) & (lengths <= 2))[short].all() and ((lengths >= 3) & (lengths <= 6))[~short].all()
    assert np.unique(lengths.round(4)).size == lengths.size and np.abs(logits(said)).max() < 1e-5
    with pytest.raises(Complaint, match="a spread above 0"):
        synthesize({"pattern": "short-keys", **TEXT, "at": 3, "spread": 0})


@pytest.mark.parametrize("name", PATTERNS)
def test_noise_is_as_large_as_asked_and_each_heads_own(name: str) -> None:
    quiet, noisy = (logits(synthesize({**ARGUMENTS[name], "noise": noise})) for noise in (0, 0.5))
    if name == "ties":
        assert np.array_equal(quiet, noisy)
        return
    noise = noisy - quiet
    assert noise.std() == pytest.approx(0.5, rel=0.1)
    assert np.corrcoef(noise.reshape(4, -1))[~np.eye(4, dtype=bool)].max() < 0.5


@pytest.mark.parametrize("name", PATTERNS)
def test_the_seed_decides(name: str) -> None:
    one, same, other = (synthesize({**ARGUMENTS[name], "seed": seed, "rows": 2}) for seed in (3, 3, 4))
    for row in range(2):
        assert all(
            np.array_equal(getattr(one, what)[row], getattr(same, what)[row]) for what in ("queries", "keys", "values")
        )
    assert not np.array_equal(one.queries[0], other.queries[0])
    assert not np.array_equal(one.queries[0], one.queries[1])
    assert not np.array_equal(one.queries[0][0], one.queries[0][1])


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_says_what_it_is(name: str) -> None:
    assert (PATTERNS[name].__doc__ or "").strip().endswith(".")


def test_uniform_without_noise_is_even() -> None:
    even = shares("uniform", noise=0)
    assert all(np.ptp(row[: n + 1]) < 1e-6 for n, row in enumerate(even))
    rows = shares("uniform")
    assert all(row[: n + 1].max() < 4 / (n + 1) for n, row in enumerate(rows))


def test_sinks_soak_up_most_of_it_and_the_rest_fades() -> None:
    rows = shares("sink", noise=0)
    assert rows[8:, :4].sum(axis=1).min() > 0.75
    assert (np.diff(rows[60, 4:61]) > 0).all()


def test_local_is_a_bell_around_the_query() -> None:
    rows = shares("local", width=4, noise=0)
    distance = np.subtract.outer(np.arange(64), np.arange(64))
    one_sided = np.sqrt((rows * distance**2).sum(axis=1)[32:])
    assert np.allclose(one_sided, 4, rtol=0.1)


def test_heavy_hitters_are_heavy_from_the_first_to_the_last() -> None:
    rows = shares("heavy-hitter")
    assert rows[3:30, 3].min() > 0.25 and rows[30:, [3, 30]].sum(axis=1).min() > 0.4
    assert rows[30:, [3, 30]].min() > 8 / 64


def test_a_milestone_is_seen_until_and_never_after() -> None:
    rows = shares("milestone")[20:, 20]
    assert rows[: 40 - 20 + 1].min() > 0.4 and rows[40 - 20 + 1 :].max() < 0.002


def test_a_phoenix_is_silent_before_and_seen_from_then_on() -> None:
    rows = shares("phoenix")[:, 5]
    assert rows[6:40].max() < 0.01 and rows[40:].min() > 0.2


def test_a_needle_is_seen_by_the_question_and_the_answer() -> None:
    rows = shares("needle", noise=0)[:, 4:7].sum(axis=1)
    assert rows[8:12].max() < 0.5 and rows[12:24].min() > 0.95 and rows[24:].max() < 0.3


def test_drift_moves_on_and_does_not_look_back() -> None:
    rows = shares("drift", every=16, width=4)
    for query in range(4, 64):
        start = query // 16 * 16
        assert rows[query, start : start + 4].sum() > 0.5
        assert start == 0 or rows[query, start - 16 : start - 12].max() < 0.005


def test_ties_tie_in_float32_as_in_float64() -> None:
    said = synthesize({**ARGUMENTS["ties"], "kinds": 5})
    scores = logits(said)
    assert np.array_equal(scores, scores.round()) and said.geometry.head_dim**0.5 in (4, 8)
    single = said.queries[0][0] @ np.repeat(said.keys[0][0], 2, axis=0).swapaxes(1, 2)
    assert np.array_equal(single * np.float32(said.geometry.head_dim**-0.5), scores)
    assert all(len(set(row[: n + 1])) <= 3 for n, row in enumerate(scores[0]))


def test_the_box_of_a_page_shows_what_it_holds() -> None:
    """Quest's bound, which sees a page through the box of its keys, ranks the milestone's first while it is used."""
    said = synthesize({**ARGUMENTS["milestone"], "fade": 4})
    queries, keys = said.queries[0][0][0], said.keys[0][0][0].reshape(16, 4, -1)
    high, low = keys.max(axis=1), keys.min(axis=1)
    bounds = np.maximum(queries, 0) @ high.T + np.minimum(queries, 0) @ low.T
    exact = logits(said)[0].reshape(64, 16, 4).max(axis=2) * said.geometry.head_dim**0.5
    assert (bounds >= exact - 1e-4).all()
    assert (bounds[24:41].argmax(axis=1) == 20 // 4).all()
    assert ((bounds[44:] > bounds[44:, [20 // 4]]).sum(axis=1) >= 5).all()


def test_only_those_who_see_it_look() -> None:
    scores = logits(synthesize({**ARGUMENTS["heavy-hitter"], "noise": 0, "seen_by": [1, 2]}))
    loud = scores[:, 40, 30] - scores[:, 40, 29]
    assert np.allclose(loud, [loud[0], loud[0] + 4, loud[0] + 4, loud[0]], atol=1e-4)


def test_rows_may_have_prompts_of_their_own() -> None:
    said = synthesize({"pattern": "sink", "prompt": [9, 4], "steps": 6, "layers": 3, "heads": 6, "kv_heads": 3})
    assert (said.prompts, said.rows, said.length) == ((9, 4), 2, 10)
    assert [array.shape for array in said.queries] == [(3, 6, 15, 16), (3, 6, 10, 16)]
    assert [array.shape for array in said.keys + said.values] == [(3, 3, 15, 16), (3, 3, 10, 16)] * 2
    assert (said.geometry.layers, said.geometry.query_heads, said.geometry.kv_heads) == (3, 6, 3)


def test_looks_at_one_token_add_up() -> None:
    scene = Scene(prompt=4, steps=4, random=np.random.default_rng(0))
    scene.look([1, 2], 3.0)
    scene.look([2, 5], np.arange(8.0))
    assert np.array_equal(scene.wanted()[6], [0, 3, 9, 0, 0, 6, 0, 0])
    assert scene.dims == 4  # ordinary tokens, 1, 2, 5


WRONG: list[tuple[Mapping[str, Any], str, tuple[str, ...], str]] = [
    ({"pattern": "sinks"}, "no pattern is called `sinks`", ("pattern",), "did you mean `sink`?"),
    ({"pattern": 3}, "no pattern is called `3`", ("pattern",), "known here: `adversarial`"),
    ({"pattern": "milestone", "at": 3}, "the argument `until` is missing", (), "known here: `at`, `until`"),
    ({"pattern": "sink", "promt": 3}, "`promt` is not an argument here", ("promt",), "did you mean `prompt`?"),
    ({"pattern": "sink", "sink": 3}, "`sink` is not an argument here", ("sink",), "did you mean `sinks`?"),
    ({"pattern": "sink", "steps": "many"}, "`many` is not a whole number from 0", ("steps",), ""),
    ({"pattern": "sink", "steps": True}, "`True` is not a whole number from 0", ("steps",), ""),
    ({"pattern": "sink", "level": "high"}, "`high` is not a number", ("level",), ""),
    ({"pattern": "sink", "level": float("inf")}, "`inf` is not a number", ("level",), ""),
    ({"pattern": "sink", "layers": 0}, "`layers` is at least 1", ("layers",), ""),
    ({"pattern": "sink", "heads": 3}, "3 query heads cannot share 2 KV heads evenly", ("heads",), "`heads: 4`"),
    ({"pattern": "sink", "prompt": [3, 4], "rows": 3}, "2 prompts for 3 rows", ("rows",), "one a row"),
    ({"pattern": "sink", "prompt": 0, "steps": 0}, "a text of no tokens", ("prompt",), ""),
    ({"pattern": "sink", "seen_by": 4}, "query heads are 0..3", ("seen_by",), ""),
    ({"pattern": "sink", "steps": 10**8}, "more text than a test can hold", ("steps",), "fewer"),
    ({"pattern": "sink", "head_dim": 4}, "4 is too small: this pattern takes 12 directions", ("head_dim",), "leave"),
    ({"pattern": "heavy-hitter", "at": 80}, "position 80 is never said", ("at",), "0..79"),
    ({"pattern": "heavy-hitter", "at": "9..3"}, "the range 9..3 is empty", ("at",), "write `3..9`"),
    ({"pattern": "heavy-hitter", "at": "last"}, "`last` is no position", ("at",), "`8..11` (both included)"),
    ({"pattern": "heavy-hitter", "at": -1}, "`-1` is no position", ("at",), ""),
    ({"pattern": "heavy-hitter", "at": []}, "no position is named", ("at",), ""),
    ({"pattern": "milestone", "at": 30, "until": 20}, "at 20 the milestone 30 has not been said", ("until",), "later"),
    ({"pattern": "phoenix", "at": 30, "from": 20}, "30 is no phoenix if it is wanted at 20", ("from",), "later"),
    ({"pattern": "drift", "width": 30}, "a region of 30 tokens does not fit into 20", ("width",), ""),
    ({"pattern": "local", "width": 0}, "a width is above 0", ("width",), ""),
    ({"pattern": "ties", "kinds": 0}, "tokens are of at least one kind", ("kinds",), ""),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "reason", "path", "hint"), WRONG, ids=[reason for _, reason, _, _ in WRONG])
def test_what_makes_no_sense_is_named(
    arguments: Mapping[str, Any], reason: str, path: tuple[str, ...], hint: str
) -> None:
    with pytest.raises(Complaint) as caught:
        synthesize(arguments)
    assert caught.value.reason == reason
    assert caught.value.path == path
    assert hint in caught.value.hint


def test_no_torch_is_needed() -> None:
    code = (
        "import sys\n"
        "from kvpolicy import load_policy\n"
        "from kvpolicy.testing.runner import run_tests\n"
        "assert all(outcome.passed for outcome in run_tests(load_policy('window')))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
