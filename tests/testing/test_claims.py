"""Claims: what each means, to the token and the step, and what is shown where one does not hold."""

from __future__ import annotations

from typing import Any

import pytest

from kvpolicy.language import loads_policy
from kvpolicy.testing.claims import CLAIMS
from kvpolicy.testing.runner import Failure, run_test, run_tests
from tests.testing.kit import TEXT, WINDOW, policy


def failures(pools: str, claims: str, attention: str = TEXT, top: str = "") -> list[Failure]:
    return list(run_test(policy(pools, claims, attention, top), 0).failures)


def first(pools: str, claim: str, attention: str = TEXT) -> tuple[Any, ...] | None:
    """(newest position, layer, row, KV head, reason) where one claim fails first; None where it holds."""
    found = failures(pools, claim, attention)
    if not found:
        return None
    (failure,) = found
    return failure.seen.newest, *failure.seen.place, failure.place.reason.removeprefix("claim: ")


@pytest.mark.parametrize(
    ("claim", "newest", "reason"),
    [
        ("{keeps: 7, until: 10}", None, ""),
        ("{keeps: 7, until: 11}", 11, "7 left"),
        ("{keeps: 7}", 11, "7 left"),
        ("{keeps: 15}", None, ""),
        ('{keeps: [2, "12..15"]}', 6, "2 left"),
        ("{keeps: 1, until: 5}", 5, "1 left"),
        ("{keeps: prompt}", 5, "0..1 left"),
        ("{keeps: prompt, until: 5}", 5, "0..1 left"),
        ("{keeps: all}", 5, "0..1 left"),
        ("{keeps: window, of: 4}", None, ""),
        ("{keeps: window, of: 5}", 5, "1 left"),
        ("{evicts: 7, by: 11}", None, ""),
        ("{evicts: 7, by: 10}", 10, "7 did not leave"),
        ('{evicts: "0..11"}', None, ""),
        ('{evicts: "0..12"}', 15, "12 did not leave"),
        ("{evicts: [1, 0], by: 5}", None, ""),
        ("{resident: 4}", None, ""),
        ("{resident: {max: 3}}", 5, "4 tokens resident, at most 3 claimed"),
        ("{resident: {min: 5}}", 5, "4 tokens resident, at least 5 claimed"),
        ('{resident: {is: "min(4, context)"}}', None, ""),
        ('{resident: {is: "4 + t // 3"}}', 8, "4 tokens resident, exactly 5 claimed"),
        ('{resident: {max: "prompt_len - 2.5 + t"}}', 5, "4 tokens resident, at most 3 claimed"),
        ("{peak: 5}", None, ""),
        ("{peak: 4}", 6, "5 tokens attended, at most 4 claimed"),
        ("{peak: {is: 5}}", None, ""),
        ("{updates: {every: 1}}", None, ""),
        ("{updates: {every: 2}}", 6, "an update, none was claimed"),
        ("{updates: {every: 0}}", 6, "an update, none was claimed"),
        ("{updates: []}", 6, "an update, none was claimed"),
        ('{updates: "6..15"}', None, ""),
        ('{updates: {at: ["6..8", 10]}}', 9, "an update, none was claimed"),
        ("{mass: 0.15}", None, ""),
        ("{mass: {max: 1}}", None, ""),
        ("{order: [2, 3, 10]}", None, ""),
        ("{order: [2, 3, 14]}", None, ""),
        ("{order: [3, 2]}", 6, "2 left before or together with 3"),
        ("{order: [0, 1]}", 5, "1 left before or together with 0"),
        ("{order: [2, 12, 14]}", 15, "12 never left"),
    ],
)
def test_a_claim_holds_to_the_token_and_the_step(claim: str, newest: int | None, reason: str) -> None:
    assert first(WINDOW, claim) == (None if newest is None else (newest, 0, 0, 0, reason))


def test_there_is_no_claim_that_is_not_tried_here() -> None:
    assert set(CLAIMS) == {"keeps", "evicts", "resident", "peak", "updates", "order", "mass"}


def test_updates_by_cadence_and_by_pool() -> None:
    pools = """
        prompt: {admit: prompt, budget: 4, update: prompt-end}
        rest: {admit: generated, budget: 3, update: {every: 3}}
    """
    held = "{updates: {every: 3}}, {updates: [8, 11, 14]}"
    held += ", {updates: {pool: rest, every: 3}}, {updates: {pool: prompt, every: 0}}"
    assert not failures(pools, held)
    assert first(pools, "{updates: {every: 4}}") == (8, 0, 0, 0, "an update, none was claimed")
    assert first(pools, "{updates: [7]}") == (7, 0, 0, 0, "no update, one was claimed")
    assert first(pools, "{updates: {pool: prompt, at: [8]}}") == (
        8,
        0,
        0,
        0,
        "no update in pool prompt, one was claimed",
    )
    assert not failures("all: {admit: all}", "{updates: {every: 0}}")


def test_pools_are_counted_apart() -> None:
    pools = "prompt: {admit: prompt}\nrest: {admit: generated, budget: 3}"
    held = (
        "{keeps: prompt}, {resident: 9}, {resident: {pool: prompt, is: 6}}, {resident: {pool: rest, is: 'min(t, 3)'}}, "
        "{peak: 10}, {peak: {pool: rest, max: 4}}, {peak: {pool: prompt, is: 6}}, "
        "{keeps: {tokens: window, of: 3, pool: rest}}, {keeps: {tokens: all, pool: prompt}}, {keeps: 5, pool: prompt}"
    )
    assert not failures(pools, held)
    assert first(pools, "{keeps: {tokens: window, of: 4, pool: rest}}") == (9, 0, 0, 0, "6 left in pool rest")
    assert first(pools, "{peak: {pool: rest, max: 3}}") == (
        9,
        0,
        0,
        0,
        "4 tokens attended in pool rest, at most 3 claimed",
    )
    assert first(pools, "{keeps: 5, pool: rest}") == (5, 0, 0, 0, "5 left in pool rest")
    (failure,) = failures(pools, "{resident: 8}")
    assert "    has no budget: nothing leaves it" in failure.details


def test_a_token_that_moves_stays_but_leaves_its_pool() -> None:
    pools = """
        hot: {admit: all, budget: 4, evict: {to: cold}}
        cold: {budget: 2}
    """
    assert not failures(
        pools, "{resident: 6}, {keeps: 7, until: 12}, {evicts: 7, by: 13}, {evicts: {tokens: 7, by: 11, pool: hot}}"
    )
    assert not failures(pools, "{keeps: {tokens: 7, until: 10, pool: hot}}, {peak: {pool: hot, is: 5}}, {peak: 7}")
    assert not failures(pools, "{peak: {pool: cold, max: 2}}")


def test_tokens_are_counted_where_budgets_count_pages() -> None:
    pools = "all: {admit: all, page: 4, budget: 8}"
    text = "{pattern: uniform, prompt: 8, steps: 9}"
    assert not failures(
        pools, "{resident: {max: 8, min: 5}}, {peak: 9}, {evicts: '0..3', by: 8}, {keeps: 4, until: 11}", text
    )
    assert first(pools, "{keeps: 4, until: 12}", text) == (12, 0, 0, 0, "4 left")


def test_claims_may_be_about_some_layers_heads_and_rows() -> None:
    pools = "all: {admit: all, budget: 4 + 2 * layer}"
    assert first(pools, "{resident: 4}") == (5, 1, 0, 0, "6 tokens resident, at most 4 claimed")
    assert not failures(pools, "{resident: {max: 4, layer: 0}}, {resident: {is: 6, layer: 1}}")
    assert first(pools, "{keeps: {tokens: 1, layer: [0, 1]}}") == (5, 0, 0, 0, "1 left")
    heavy = "{pattern: heavy-hitter, prompt: 6, steps: 10, at: 3, seen_by: [2, 3], rows: 2, layers: 1}"
    scored = "all: {admit: all, budget: 4, window: 2, scorer: {signal: attention, memory: sum}}"
    assert not failures(scored, "{keeps: {tokens: 3, head: 1}}", heavy)
    assert not failures(scored, "{keeps: {tokens: 3, head: [1], row: [0, 1]}}", heavy)
    failure = first(scored, "{keeps: 3}", heavy)
    assert failure is not None and failure[1:4] in ((0, 0, 0), (0, 1, 0))


def test_rows_go_by_their_own_positions() -> None:
    ragged = "{pattern: uniform, prompt: [9, 2], steps: 6}"
    held = (
        "{keeps: window, of: 4}, {resident: {is: 'min(context, 4)'}}, {evicts: 0, by: 4}, {keeps: {tokens: 5, row: 1}}"
    )
    assert not failures(WINDOW, held, ragged)
    assert first(WINDOW, "{evicts: 0, by: 3}", ragged) == (3, 0, 1, 0, "0 did not leave")


def test_numbers_may_name_the_params_of_the_test() -> None:
    top = "params: {tokens: {default: 9, help: tokens kept}}"
    found = policy("all: {admit: all, budget: tokens}", "{resident: {is: tokens}}, {keeps: window, of: 4}", TEXT, top)
    text = found.to_yaml().replace("- name: claim\n", "- name: claim\n  set: {tokens: 5}\n")
    (outcome,) = run_tests(loads_policy(text))
    assert outcome.passed and outcome.evicted == (1 + 10) * 4


@pytest.mark.parametrize("top", ["prompt_chunk: 3", "positions: compact"])
@pytest.mark.parametrize("runtime", [False, True])
def test_the_prompt_in_chunks_and_places_that_are_ranks(top: str, runtime: bool) -> None:
    """Synthetic keys carry no rotation, so ranks change nothing of what they say."""
    claims = "{keeps: window, of: 4}, {resident: 4}, {evicts: 0, by: 5}"
    assert run_test(policy(WINDOW, claims, TEXT, top), 0, runtime=runtime).passed


def test_a_chunk_of_the_prompt_is_a_moment() -> None:
    chunked = "prompt_chunk: 3"
    (failure,) = failures("all: {admit: all, budget: 2}", "{keeps: 0, until: 5}", TEXT, chunked)
    assert (failure.seen.newest, failure.seen.step.kind) == (2, "prompt")


@pytest.mark.parametrize("runtime", [False, True])
def test_a_failure_shows_where_what_and_why(runtime: bool) -> None:
    scored = "all: {admit: all, budget: 4, window: 2, scorer: {signal: attention, memory: sum}}"
    claims = "{keeps: 3, until: 5}, {keeps: 8, until: 12}, {resident: 4}"
    heavy = "{pattern: heavy-hitter, prompt: 6, steps: 10, at: 3, noise: 0}"
    outcome = run_test(policy(scored, claims, heavy), 0, runtime=runtime)
    (failure,) = outcome.failures
    assert not outcome.passed and failure.claim == 1
    lines = str(outcome).splitlines()
    assert lines[0] == "test.yaml:9:34: claim: 8 left"
    assert lines[1].endswith(f"expect: [{claims}]")
    assert lines[2].strip(" |") == "^" * len("{keeps: 8, until: 12}")
    assert lines[3] == "  at position 10 (t 5, generated token), layer 0, row 0, KV head 0"
    assert lines[4] == "    pool all keeps 4 tokens: 3, 5, 9..10"
    assert lines[5] == "      budget 4; protected: 9..10"
    assert lines[6] == "      left in this pass: 8"
    assert lines[7].startswith("      scores of units (named by their first tokens), lowest first: 8: 0.0")
    assert " <, 5: " in lines[7] and len(lines) == 8


def test_long_rankings_are_cut_but_for_what_the_claim_is_about() -> None:
    scored = "all: {admit: all, budget: 40, scorer: {signal: attention}, update: {every: 5}}"
    (failure,) = failures(
        scored, "{keeps: 20}, {resident: 45}", "{pattern: milestone, prompt: 60, steps: 9, at: 20, until: 59}"
    )
    ranking = next(line for line in failure.details if "lowest first" in line)
    assert " 20: " in ranking and ranking.endswith(" more") and ranking.count(":") < 25


def test_what_holds_says_so_and_how_much_was_evicted() -> None:
    (outcome,) = run_tests(policy(WINDOW, "{resident: 4}"))
    assert str(outcome) == "test: claim: holds (48 tokens evicted)"
