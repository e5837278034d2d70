"""The full cache's attention, and the share of it that a policy holds: against the oracle's own softmax."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from kvpolicy.language import loads_policy
from kvpolicy.testing import full_cache
from kvpolicy.testing.feeding import OracleAlone, plan_for, watch
from kvpolicy.testing.full_cache import FullCache
from kvpolicy.testing.patterns import Attention, synthesize

RAGGED = {"pattern": "milestone", "at": 3, "until": 12, "prompt": [9, 6], "steps": 14, "heads": 6, "kv_heads": 2}
DENSE = "kvpolicy: 1\nname: dense\npools:\n  all: {admit: all}\n"
WINDOW = "kvpolicy: 1\nname: window\npools:\n  all: {admit: all, budget: 5}\n"


def said() -> Attention:
    return synthesize(RAGGED)


@pytest.mark.parametrize("block", [1, 40, full_cache.BLOCK])
def test_it_is_what_the_oracle_sees_where_nothing_is_dropped(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole texts, a few queries and single ones at a time give the same."""
    monkeypatch.setattr(full_cache, "BLOCK", block)
    text = said()
    full, compared = FullCache(text), 0
    for seen in watch(OracleAlone(plan_for(loads_policy(DENSE), text)), text):
        probabilities = full.probabilities(*seen.place, seen.newest)
        assert probabilities.shape == (seen.newest + 1,) and probabilities.dtype == np.float64
        assert probabilities.sum() == pytest.approx(1)
        assert np.abs(probabilities - seen.step.probabilities[seen.head][:, -1].mean(axis=0)).max() < 1e-12
        assert full.mass(seen) == pytest.approx(1)
        compared += 1
    assert compared == 2 * 2 * 2 * 15


def test_mass_is_the_share_of_what_is_attended() -> None:
    text = said()
    full = FullCache(text)
    shares = []
    for seen in watch(OracleAlone(plan_for(loads_policy(WINDOW), text)), text):
        attended = sorted(seen.attended())
        expected = full.probabilities(*seen.place, seen.newest)[attended].sum()
        assert full.mass(seen) == pytest.approx(expected)
        if seen.step.kind == "generated":
            assert attended == list(range(seen.newest - 5, seen.newest + 1))  # the budget, and the token just said
            shares.append(full.mass(seen))
    assert min(shares) < 0.3 < 0.5 < max(shares)


def test_what_is_kept_but_not_read_has_no_share() -> None:
    text = said()
    full = FullCache(text)
    newest = "kvpolicy: 1\nname: newest\npools: {all: {admit: all, read: {top: 6, scorer: {signal: recency}}}}"
    for seen in watch(OracleAlone(plan_for(loads_policy(newest), text)), text):
        assert seen.held() == frozenset(range(seen.newest + 1))
        if seen.step.kind == "generated":
            read = list(range(seen.newest - 5, seen.newest + 1))
            assert sorted(seen.attended("all")) == read
            assert full.mass(seen) == pytest.approx(full.probabilities(*seen.place, seen.newest)[read].sum())
            assert {token for token, _ in full.lost(seen)} == set(range(seen.newest - 5))
        else:
            assert full.mass(seen) == pytest.approx(1)


def test_a_policy_that_lost_the_milestone_lost_its_mass() -> None:
    text = synthesize({"pattern": "milestone", "at": 3, "until": 12, "prompt": 2, "steps": 20, "noise": 0})
    full = FullCache(text)
    for seen in watch(OracleAlone(plan_for(loads_policy(WINDOW), text)), text):
        lost = 1 - full.mass(seen)
        wanted = full.probabilities(*seen.place, seen.newest)[3] if seen.newest >= 3 else 0.0
        if 9 <= seen.newest <= 12:
            assert wanted > 0.4 and lost > wanted
        elif seen.newest > 12:
            assert wanted < 0.01


def test_another_scaling_is_another_attention() -> None:
    text = said()
    twice = replace(text, scaling=2 * text.scale)
    doubled = replace(text, queries=tuple(row * np.float32(2) for row in text.queries))
    one, two, plain = (FullCache(each).probabilities(1, 0, 1, 15) for each in (twice, doubled, text))
    assert np.allclose(one, two, atol=1e-7) and not np.allclose(one, plain, atol=1e-3)
    for seen in watch(OracleAlone(plan_for(loads_policy(DENSE), twice)), twice):
        probabilities = FullCache(twice).probabilities(*seen.place, seen.newest)
        assert np.abs(probabilities - seen.step.probabilities[seen.head][:, -1].mean(axis=0)).max() < 1e-12
        if seen.newest == 8:
            break


@pytest.mark.parametrize("place", [(0, 0, 0, 23), (0, 0, 0, -1), (0, 0, 2, 3), (2, 0, 0, 3), (0, 2, 0, 3)])
def test_what_is_not_there_is_an_index_error(place: tuple[int, int, int, int]) -> None:
    with pytest.raises(IndexError):
        FullCache(said()).probabilities(*place)


def test_a_long_text_takes_memory_for_a_few_queries_only() -> None:
    length = 6000
    text = synthesize(
        {"pattern": "uniform", "prompt": 10, "steps": length - 10, "layers": 1, "heads": 2, "kv_heads": 1}
    )
    full = FullCache(text)
    tracemalloc.start()
    for newest in range(length - 200, length):
        full.probabilities(0, 0, 0, newest)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < length * length * 8 / 20
