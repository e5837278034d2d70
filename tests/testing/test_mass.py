"""The claim `mass`: how much of the full cache's attention is still there."""

from __future__ import annotations

from typing import Any

import pytest

from kvpolicy.testing.runner import Failure, run_test
from tests.testing.kit import WINDOW, policy
from tests.testing.test_claim_mistakes import mistake_in

EVEN = "{pattern: uniform, prompt: 6, steps: 10, noise: 0}"
"""At position p a window of 4 and the token itself hold 5 of p + 1 tokens, all alike: 5/7 at 6, 5/16 at 15."""

MILESTONE = "{pattern: milestone, prompt: 6, steps: 14, at: 7, until: 15, noise: 0, fade: 0}"


def failures(claims: str, attention: str = EVEN, pools: str = WINDOW) -> list[Failure]:
    return list(run_test(policy(pools, claims, attention), 0).failures)


def first(claim: str, attention: str = EVEN, pools: str = WINDOW) -> tuple[int, str] | None:
    """(newest position, reason) where one claim fails first; None where it holds."""
    found = failures(claim, attention, pools)
    assert len(found) <= 1
    return (found[0].seen.newest, found[0].place.reason.removeprefix("claim: ")) if found else None


@pytest.mark.parametrize(
    ("claim", "newest", "reason"),
    [
        ("{mass: 31%}", None, ""),
        ("{mass: {min: 0.3125}}", None, ""),
        ("{mass: {min: 0.3126}}", 15, "0.3125 of the full cache's attention is attended, at least 0.3126 claimed"),
        ("{mass: {min: 50%}}", 10, "0.4545 of the full cache's attention is attended, at least 0.5 claimed"),
        ("{mass: 0.5, until: 9}", None, ""),
        ("{mass: {min: 0.5, until: 10}}", 10, "0.4545"),
        ("{mass: {min: 1.0}}", 6, "0.7143"),
        ("{mass: {max: 0.72}}", None, ""),
        ("{mass: {max: 0.71}}", 6, "0.7143 of the full cache's attention is attended, at most 0.71 claimed"),
        ("{mass: {max: 0.5, from: 9}}", None, ""),
        ("{mass: {max: 0.5, from: 8}}", 8, "0.5556"),
        ("{mass: {min: 0.45, max: 0.6, from: 8, until: 10}}", None, ""),
        ("{mass: {mean: 0.46}}", None, ""),  # the mean of 5/7, 5/8, …, 5/16 is 0.4654
        ("{mass: {mean: 0.47}}", 15, "0.4654 of the full cache's attention is attended, on average at least 0.47"),
        ("{mass: {mean: 0.70, until: 6}}", None, ""),
        ("{mass: {mean: 0.70, until: 7}}", 7, "0.6696"),
        ("{mass: {mean: 0.35, from: 13}}", 15, "0.3343"),
        ("{mass: {min: 0.4, layer: 0, head: 1, row: 0, from: 2}}", 12, "0.3846"),
    ],
)
def test_the_share_is_judged_to_the_token_and_the_step(claim: str, newest: int | None, reason: str) -> None:
    found = first(claim)
    if newest is None:
        assert found is None
    else:
        assert found is not None and found[0] == newest and found[1].startswith(reason)


def test_a_failure_names_the_lost_tokens_that_weigh_most() -> None:
    """The milestone leaves the window at 11; the queries up to 15 go on looking at it."""
    found = failures("{mass: 0.5}", MILESTONE)
    (failure,) = found
    assert failure.seen.newest == 12 and 7 not in failure.seen.attended()
    share = failure.seen.full.mass(failure.seen)
    lost = failure.seen.full.lost(failure.seen)
    assert lost[0][0] == 7 and lost[0][1] > 0.8 and sum(weight for _, weight in lost) + share == pytest.approx(1)
    reason = failure.place.reason
    assert f"it would look at 7 ({lost[0][1]:.1%}), 0 (" in reason and reason.count("%)") == 4
    assert any("pool all keeps" in line for line in failure.details)


@pytest.mark.parametrize("runtime", [False, True])
def test_it_tells_good_policies_from_bad_ones(runtime: bool) -> None:
    scored = "all: {admit: all, budget: 4, window: 1, scorer: {signal: attention, memory: sum}}"
    claim = "{mass: {min: 0.8, from: 9, until: 15}}, {mass: {mean: 85%, from: 9, until: 15}}"
    assert run_test(policy(scored, claim, MILESTONE), 0, runtime=runtime).passed
    assert len(run_test(policy(WINDOW, claim, MILESTONE), 0, runtime=runtime).failures) == 2


def test_the_full_cache_holds_it_all() -> None:
    assert first("{mass: 1}", pools="all: {admit: all}") is None
    assert first("{mass: {max: 0.999}}", pools="all: {admit: all}") == (
        6,
        "1 of the full cache's attention is attended, at most 0.999 claimed",
    )


def test_pools_are_judged_by_what_they_admit() -> None:
    pools = "prompt: {admit: prompt, budget: 3, update: prompt-end}\nrest: {admit: generated, budget: 4}"
    held = "{mass: {min: 0.5, max: 0.5, pool: prompt}}, {mass: {min: 0.5, pool: rest}}"
    assert not failures(held, pools=pools)
    assert first("{mass: {min: 0.51, pool: rest}}", pools=pools) == (
        15,
        "0.5 of the full cache's attention is attended in pool rest, at least 0.51 claimed; it would look at "
        "6 (6.2%), 7 (6.2%), 8 (6.2%), 9 (6.2%)",
    )
    fed = "hot: {admit: all, budget: 4, evict: {to: cold}}\ncold: {budget: 2}"
    underlined, mistake = mistake_in(policy(fed, "{mass: {min: 0.1, pool: cold}}"))
    assert (underlined, mistake.reason[:26]) == ("cold", "pool cold admits no token:")


def test_a_text_without_generated_tokens_has_nothing_to_judge() -> None:
    _, mistake = mistake_in(policy(WINDOW, "{mass: 0.5}", "{pattern: uniform, prompt: 6, steps: 0}"))
    assert "no token is generated" in mistake.reason


def test_rows_end_when_they_end() -> None:
    ragged: dict[str, Any] = {"attention": "{pattern: uniform, prompt: [9, 2], steps: 6, noise: 0}"}
    share = {row: sum(5 / max(5, prompt + n) for n in range(1, 7)) / 6 for row, prompt in enumerate((9, 2))}
    for row, mean in share.items():
        assert first(f"{{mass: {{mean: {mean - 1e-6}, row: {row}}}}}", **ragged) is None
        failed = first(f"{{mass: {{mean: {mean + 1e-6}, row: {row}}}}}", **ragged)
        assert failed is not None and failed[0] == (14, 7)[row]
