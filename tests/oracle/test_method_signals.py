"""Signals that serve one method each (Keyformer's, Scissorhands', LagKV's): small cases worked out by hand."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from kvpolicy.errors import PolicyError
from kvpolicy.language import loads_policy
from kvpolicy.oracle import Oracle, Step
from kvpolicy.plan import ModelGeometry, make_plan
from tests.oracle.kit import Picture, plan_of, scores

ROW = [0.5, 0.2, 0.2, 0.1]


def scored(scorer: str, **shape: int) -> Picture:
    """A pool too large to drop anything, with this scorer."""
    return Picture(f"all: {{admit: all, budget: 60, scorer: {scorer}}}", **shape)


# gumbel-attention.


def noises(row: list[float], found: dict[int, float], temperature: float) -> list[float]:
    """The noise that turned probabilities into these, up to a common number: the softmax undone."""
    return [temperature * math.log(found[at]) - math.log(p) for at, p in enumerate(row)]


def test_noise_is_drawn_once_for_each_token_and_the_temperature_rises_with_t() -> None:
    run = scored("{signal: {gumbel-attention: {temperature: 0.5, growth: 0.25, seed: 3}}}")
    first = noises(ROW, scores(run.prompt([1], [1], [1], ROW), "all"), 0.5)
    later = [*ROW[:3], 0.05, 0.05]
    second = noises(later, scores(run.say(later), "all"), 0.75)
    assert np.diff(second[:4]) == pytest.approx(np.diff(first), abs=1e-6)
    assert len({round(noise - first[0], 6) for noise in first}) == 4


def test_noise_is_of_gumbels_distribution_and_goes_by_seed_layer_and_head() -> None:
    def drawn(seed: int) -> list[np.ndarray]:
        pools = f"all: {{admit: all, budget: 400, scorer: {{signal: {{gumbel-attention: {{seed: {seed}}}}}}}}}"
        oracle = Oracle(plan_of(pools, layers=2, query_heads=2, kv_heads=2, prompt=400))
        found = []
        for layer in range(2):
            step = oracle.step(layer, None, None, logits=[np.zeros((2, 400, 400))])[0]
            choices = [heads["all"].choice for heads in step.heads]
            found += [np.log([choice.scores[at] for at in range(400)]) for choice in choices if choice is not None]
        return found

    noise = drawn(0)
    for one in (*noise[1:], drawn(1)[0]):
        assert abs(np.corrcoef(noise[0], one)[0, 1]) < 0.2
    for one in noise:  # the spread of a Gumbel number is pi / sqrt(6), its skew 1.14
        assert one.std() == pytest.approx(math.pi / math.sqrt(6), rel=0.15)
        assert ((one - one.mean()) ** 3).mean() / one.std() ** 3 > 0.5


def test_heads_of_a_group_share_the_noise() -> None:
    run = scored("{signal: gumbel-attention, heads: max}", query_heads=2)
    alone = scored("{signal: gumbel-attention}")
    rows = [[1], [1], [1], ROW]
    assert scores(run.heads(rows, rows, kind="prompt"), "all") == scores(alone.prompt(*rows), "all")


# above-average.


def test_a_token_is_above_average_from_its_share_on() -> None:
    step = scored("{signal: above-average}").prompt([1], [1], [1], [0.45, 0.25, 0.2, 0.1])
    assert scores(step, "all") == {0: 1, 1: 1, 2: 0, 3: 0}  # 1 / 4 is a share
    even = scored("{signal: above-average}").tokens(7)
    assert set(scores(even, "all").values()) == {1}


def test_a_share_is_of_what_a_query_sees_and_queries_add_up() -> None:
    rows = [1], [0.6, 0.4], [0.1, 0.5, 0.4], [0.24, 0.26, 0.4, 0.1]
    step = scored("{signal: above-average, queries: all}").prompt(*rows)
    assert scores(step, "all") == {0: 2, 1: 2, 2: 2, 3: 0}
    step = scored("{signal: above-average, queries: {last: 2}}").prompt(*rows)
    assert scores(step, "all") == {0: 0, 1: 1, 2: 1, 3: 0}


def test_a_share_of_the_pool_or_of_a_group_of_heads() -> None:
    def run(over: str) -> dict[int, float]:
        picture = Picture(f"""
            prompt: {{admit: prompt}}
            rest: {{admit: generated, budget: 9, scorer: {{signal: above-average, over: {over}}}}}
        """)
        picture.tokens(1)
        picture.say()
        return scores(picture.say([0.7, 0.18, 0.12]), "rest")

    assert run("cache") == {1: 0, 2: 0} and run("pool") == {1: 1, 2: 0}
    heads = [[1], [0.7, 0.3]], [[1], [0.1, 0.9]]
    mean = scored("{signal: above-average}", query_heads=2).heads(*heads, kind="prompt")
    assert scores(mean, "all") == {0: 0.5, 1: 0.5}
    first = scored("{signal: above-average, heads: {logits: max}}", query_heads=2).heads(*heads, kind="prompt")
    assert scores(first, "all") == {0: 0, 1: 1}  # 0.7 and 0.9, made to add up


# lag.


def blocks(keys: list[list[float]], values: list[list[float]], scorer: str, pool: str = "") -> Step:
    pools = f"all: {{admit: all, budget: 60, {pool} scorer: {scorer}}}"
    oracle = Oracle(plan_of(pools, head_dim=len(keys[0])))
    queries = np.zeros((1, len(keys), len(keys[0])))
    return oracle.step(0, [queries], [np.array([keys])], [np.array([values])])[0]


KEYS = [[9.0, 9.0, 9.0], [0.0, 5.0, 10.0], [5.0, 5.0, 5.0], [0.0, 1.0, 2.0], [10.0, 0.0, 0.0], [0.0, 10.0, 10.0]]
LEVEL = [[0.0, 0.0, 0.0]] * 4 + [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]


def test_a_block_is_ranked_against_the_ranges_of_the_next() -> None:
    step = blocks(KEYS, LEVEL, "{signal: {lag: {lag: 3}}}")
    # 3..5 range over 0..10 in the first channel, 0..10 in the others: of 0..2, 1 spreads most, 0 and 2 not at all.
    assert scores(step, "all") == {0: -0.666666667, 1: 0, 2: -0.333333333, 3: 1, 4: 1, 5: 1}


def test_values_count_as_much_as_keys_and_channels_are_scaled() -> None:
    values = [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [100.0, 1.0]]
    keys = [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert scores(blocks(keys, values, "{signal: {lag: {lag: 2}}}"), "all") == {0: -0.5, 1: 0, 2: 1, 3: 1}
    spread = [statistics.stdev(vector) for vector in ([0.0, 0.0], [0.01, 0.0])]  # the ranges: 0..100, 0..1
    keys[0] = [1.0, 1.0 - 2 * (spread[1] - spread[0]) * math.sqrt(2)]  # a key that spreads twice as much
    assert scores(blocks(keys, values, "{signal: {lag: {lag: 2}}}"), "all") == {0: 0, 1: -0.5, 2: 1, 3: 1}


def test_blocks_begin_after_the_sinks_and_the_last_two_wait() -> None:
    step = blocks(KEYS, LEVEL, "{signal: {lag: {lag: 2, after: 1}}}")
    assert scores(step, "all") == {0: 1, 1: 0, 2: -0.5, 3: 1, 4: 1, 5: 1}  # 3..4 is whole, 5 alone is not
    step = blocks(KEYS, LEVEL, "{signal: {lag: {lag: 2}}}")
    assert [scores(step, "all")[at] for at in (4, 5)] == [1, 1] and scores(step, "all")[3] < 1


def test_a_block_that_was_thinned_out_stays_a_block() -> None:
    random = np.random.default_rng(0)
    keys, values = random.normal(size=(2, 1, 20, 4))
    pools = "all: {admit: all, budget: 'if(context < 12, 60, 9)', scorer: {signal: {lag: {lag: 4}}}}"
    oracle = Oracle(plan_of(pools))
    for end in range(12, 17):
        part = slice(0, 12) if end == 12 else slice(end - 1, end)
        step = oracle.step(0, [keys[:, part]], [keys[:, part]], [values[:, part]])[0]
        kept = sorted(step.heads[0]["all"].kept)
    assert len(kept) == 9 and {at // 4 for at in kept} == {0, 1, 2, 3}
    found = scores(step, "all")
    assert all(found[at] == 1 for at in kept if at >= 12)
    for block in range(3):
        here = sorted(found[at] for at in found if at // 4 == block)
        assert here == [-rank / 4 for rank in range(len(here))][::-1]


# Arguments.


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("{lag: {lag: 0}}", "`lag` is 0; the least that makes sense is 1"),
        ("{lag: {after: -1}}", "`after` is -1; the least that makes sense is 0"),
        ("{gumbel-attention: {temperature: 0}}", "`temperature` is 0; the least that makes sense is 0.01"),
        ("{gumbel-attention: {growth: -1}}", "`growth` is -1; the least that makes sense is 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(said: str, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        plan_of(f"all: {{admit: all, budget: 9, scorer: {{signal: {said}}}}}")


def test_what_only_some_layers_make_senseless_is_refused_with_the_plan() -> None:
    text = "kvpolicy: 1\nname: deep\npools: {all: {admit: all, budget: 9, scorer: {signal: {lag: {lag: 2 - layer}}}}}"
    policy = loads_policy(text)
    assert make_plan(policy, ModelGeometry("test", 2, 1, 1, 4), prompt=9, max_new_tokens=9)
    with pytest.raises(PolicyError, match="`lag` of `lag` is 0 in layer 2; the least is 1"):
        make_plan(policy, ModelGeometry("test", 3, 1, 1, 4), prompt=9, max_new_tokens=9)
