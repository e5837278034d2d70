"""Signals and stages: small cases worked out by hand."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from kvpolicy.oracle import Oracle, Step
from tests.oracle.kit import Picture, kept, plan_of, resident, scores

Rows = list[list[float]] | None
PROMPT = ([1], [0.6, 0.4], [0.1, 0.2, 0.7], [0.1, 0.2, 0.3, 0.4])


def scored(scorer: str, **shape: int) -> Picture:
    """A pool too large to drop anything, with this scorer."""
    return Picture(f"all: {{admit: all, budget: 60, scorer: {scorer}}}", **shape)


def prompted(scorer: str, *rows: Sequence[float]) -> dict[int, float]:
    """Its scores after one prompt pass."""
    return scores(scored(scorer).prompt(*rows), "all")


def vectors(
    scorer: str, keys: list[list[float]], query: list[float], values: list | None = None, page: int = 1
) -> Step:
    """One prompt pass of real keys, whose queries are all the same."""
    pools = f"all: {{admit: all, budget: 60, page: {page}, scorer: {scorer}}}"
    oracle = Oracle(plan_of(pools, head_dim=len(query)))
    queries = np.array([[query] * len(keys)], dtype=float)
    return oracle.step(0, [queries], [np.array([keys])], [np.array([values or keys])], scaling=1.0)[0]


# Queries and heads.


def test_queries() -> None:
    assert prompted("{signal: attention}", *PROMPT) == {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}
    assert prompted("{signal: attention, queries: all}", *PROMPT) == {0: 1.8, 1: 0.8, 2: 1.0, 3: 0.4}
    last = scored("{signal: attention, queries: {last: 2}}")
    assert scores(last.prompt(*PROMPT), "all") == {0: 0.1, 1: 0.2, 2: 0.5, 3: 0.2}
    step = last.say([0.5, 0.1, 0.1, 0.2, 0.1])  # the two newest queries, over passes
    assert scores(step, "all") == {0: 0.3, 1: 0.15, 2: 0.2, 3: 0.3, 4: 0.05}
    assert prompted("{signal: attention, queries: {last: 9}}", [1], [0.6, 0.4]) == {0: 0.8, 1: 0.2}


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ("mean", {0: 0.35, 1: 0.35, 2: 0.3}),
        ("max", {0: 0.5, 1: 0.4, 2: 0.4}),
        ("sum", {0: 0.7, 1: 0.7, 2: 0.6}),
        ("{logits: max}", {0: 5 / 13, 1: 4 / 13, 2: 4 / 13}),
    ],
)
def test_heads_of_a_group(heads: str, expected: dict[int, float]) -> None:
    run = scored(f"{{signal: attention, heads: {heads}}}", query_heads=2)
    step = run.heads([[1], [1], [0.5, 0.3, 0.2]], [[1], [1], [0.2, 0.4, 0.4]], kind="prompt")
    assert scores(step, "all") == pytest.approx(expected)


def test_the_softmax_may_be_taken_over_the_pool_or_its_candidates() -> None:
    def run(over: str) -> dict[int, float]:
        picture = Picture(f"""
            prompt: {{admit: prompt}}
            rest: {{admit: generated, budget: 9, window: 1, scorer: {{signal: attention, over: {over}}}}}
        """)
        picture.tokens(1)
        for _ in range(2):
            picture.say()
        return scores(picture.say([0.5, 0.1, 0.3, 0.1]), "rest")

    assert run("cache") == {1: 0.1, 2: 0.3}
    assert run("pool") == {1: 0.2, 2: 0.6}
    assert run("candidates") == {1: 0.25, 2: 0.75}


# Signals.


def test_logits_and_norms() -> None:
    keys, values = [[3.0, 4.0], [1.0, -1.0]], [[1.0, 0.0], [0.0, 2.0]]
    assert scores(vectors("{signal: attention-logit}", keys, [2.0, -1.0]), "all") == {0: 2, 1: 3}
    assert scores(vectors("{signal: key-norm}", keys, [1.0, 0.0]), "all") == pytest.approx({0: 5, 1: math.sqrt(2)})
    assert scores(vectors("{signal: value-norm}", keys, [1.0, 0.0], values), "all") == {0: 1, 1: 2}
    low = vectors("{signal: key-norm, weight: -1}", keys, [1.0, 0.0])
    assert scores(low, "all") == pytest.approx({0: -5, 1: -math.sqrt(2)})


def test_page_bound_is_the_best_any_key_in_the_box_could_do() -> None:
    keys = [[1.0, 5.0], [3.0, -2.0], [0.0, 1.0], [0.0, 1.0]]
    # Box of the first page: 1..3 by -2..5. The query takes the high end of the first channel, the low of the second.
    step = vectors("{signal: page-bound}", keys, [2.0, -1.0], page=2)
    assert scores(step, "all") == {0: 2 * 3 + -1 * -2}
    assert scores(vectors("{signal: page-bound}", keys, [2.0, -1.0]), "all") == {0: -3, 1: 8, 2: -1, 3: -1}


def test_recency_of_a_page_is_its_newest_token() -> None:
    run = Picture("all: {admit: all, page: 2, budget: 60}")
    assert scores(run.tokens(5), "all") == {0: 1, 2: 3}


def test_random_is_a_hash_of_seed_layer_head_and_position() -> None:
    def finalised(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def expected(*numbers: int) -> float:
        h = 0
        for x in numbers:
            h = finalised(h ^ ((x + 0x9E3779B97F4A7C15) % 2**64))
        return (h >> 40) / 2**24

    pools = "all: {admit: all, budget: 60, scorer: {signal: {random: {seed: 7}}}}"
    plan = plan_of(pools, layers=2, query_heads=2, kv_heads=2)
    oracle = Oracle(plan)
    step = [oracle.step(layer, None, None, logits=[np.zeros((2, 3, 3))])[0] for layer in range(2)][1]
    for head in range(2):
        assert scores(step, "all", head) == pytest.approx({p: expected(7, 1, head, p) for p in range(3)}, abs=1e-9)
    # splitmix64 seeded with 0 gives this as its first output, so the finaliser is the published one.
    assert finalised(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_key_anchor_is_the_cosine_with_the_mean_direction() -> None:
    keys = [[2.0, 0.0], [0.0, 3.0], [5.0, 0.0]]
    # Unit keys (1,0), (0,1), (1,0): their mean points along (2,1).
    expected = {0: 2 / math.sqrt(5), 1: 1 / math.sqrt(5), 2: 2 / math.sqrt(5)}
    assert scores(vectors("{signal: key-anchor}", keys, [0.0, 0.0]), "all") == pytest.approx(expected)


def test_key_similarity_excuses_the_newest_copy() -> None:
    keys = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8]]
    # Cosines above 0.5, by row: 0: 1 3 4, 1: 0 3 4, 2: 4, 3: 0 1 4, 4: 0 1 2 3; each lifts its newest: 4 4 4 4 3.
    expected = {0: (1 + 1 + 0.6) / 5, 1: (1 + 1 + 0.6) / 5, 2: 0.8 / 5, 3: (1 + 1) / 5, 4: 0.0}
    step = vectors("{signal: {key-similarity: {above: 0.5, keep: newest}}}", keys, [0.0, 0.0])
    assert scores(step, "all") == pytest.approx(expected)
    # Nothing lies above 1, so nothing is lifted.
    step = vectors("{signal: {key-similarity: {above: 1}}}", keys, [0.0, 0.0])
    assert scores(step, "all")[4] == pytest.approx((0.6 + 0.6 + 0.8 + 0.6) / 5)


# Stages after the signal.


def test_smoothing_is_over_candidates_with_zeros_beyond_the_ends() -> None:
    row = [0.1, 0.2, 0.4, 0.2, 0.1]
    rows = [[1.0]] * 4 + [row]
    assert prompted("{signal: attention, smooth: {max: 3}}", *rows) == {
        0: 0.2, 1: 0.4, 2: 0.4, 3: 0.4, 4: 0.2,
    }  # fmt: skip
    mean = prompted("{signal: attention, smooth: {mean: 3}}", *rows)
    assert mean == pytest.approx({0: 0.1, 1: 0.7 / 3, 2: 0.8 / 3, 3: 0.7 / 3, 4: 0.1})
    scorer = "{signal: attention, smooth: {max: 3}}"
    run = Picture(f"all: {{admit: all, budget: 60, pinned: {{first: 1}}, window: 1, scorer: {scorer}}}")
    assert scores(run.prompt(*rows), "all") == {1: 0.4, 2: 0.4, 3: 0.4}


def test_norms_over_candidates() -> None:
    rows = [[1.0]] * 3 + [[0.1, 0.2, 0.4, 0.3]]

    def run(norm: str, budget: int = 60) -> dict[int, float]:
        pools = f"all: {{admit: all, budget: {budget}, window: 1, scorer: {{signal: attention, norm: {norm}}}}}"
        return scores(Picture(pools).prompt(*rows), "all")

    assert run("max") == {0: 0.25, 1: 0.5, 2: 1}
    total = math.exp(0.1) + math.exp(0.2) + math.exp(0.4)
    assert run("softmax") == pytest.approx(
        {0: math.exp(0.1) / total, 1: math.exp(0.2) / total, 2: math.exp(0.4) / total}
    )
    # Budget 2 leaves room for one candidate beside the window: the best holds 0.4 of 0.7.
    assert run("mass", budget=2) == pytest.approx({0: 0.4 / 7, 1: 0.8 / 7, 2: 1.6 / 7})
    assert run("mass") == {0: 0.1, 1: 0.2, 2: 0.4}


def test_hits() -> None:
    rows = [[1.0]] * 4 + [[0.1, 0.3, 0.1, 0.3, 0.2]]
    # ceil(50% of 5) = 3: 0.3, 0.3, 0.2; of the two 0.1 the newer would come next.
    assert prompted("{signal: attention, hit: {top: 50%}}", *rows) == {0: 0, 1: 1, 2: 0, 3: 1, 4: 1}
    assert prompted("{signal: attention, hit: {top: 80%}}", *rows) == {0: 0, 1: 1, 2: 1, 3: 1, 4: 1}
    assert prompted("{signal: attention, hit: {above: 0.2}}", *rows) == {0: 0, 1: 1, 2: 0, 3: 1, 4: 1}
    assert not any(prompted("{signal: attention, hit: {top: 0}}", *rows).values())


def test_hits_are_ranked_over_the_cache_the_pool_or_the_candidates() -> None:
    def run(over: str) -> dict[int, float]:
        picture = Picture(f"""
            prompt: {{admit: prompt}}
            rest:
              admit: generated
              budget: 60
              window: 1
              scorer: {{signal: attention, over: {over}, hit: {{top: 50%}}}}
        """)
        picture.tokens(3)
        for _ in range(3):
            picture.say()
        return scores(picture.say([0.2, 0.2, 0.2, 0.05, 0.1, 0.05, 0.2]), "rest")

    assert run("cache") == {3: 0, 4: 0, 5: 0}  # four of seven: 0, 1, 2 and 6
    assert run("pool") == {3: 0, 4: 1, 5: 0}  # two of four: 6, and 4
    assert run("candidates") == {3: 0, 4: 1, 5: 1}  # two of three: 4, and of 3 and 5 the newer


def test_ranking_the_cache_counts_pages_of_all_pools() -> None:
    picture = Picture("""
        prompt: {admit: prompt, page: 2}
        rest: {admit: generated, budget: 60, page: 2, scorer: {signal: attention, hit: {top: 25%}}}
    """)
    picture.tokens(4)
    for _ in range(3):
        step = picture.say([0.1, 0.1, 0.1, 0.4, 0.3])
    # Four pages, one hit: the prompt's second page has the best token. Without it, 4 would be hit.
    assert scores(step, "rest") == {4: 0} and step.hits[0].scores == pytest.approx({0: 0.1, 2: 0.4, 4: 0.3, 6: 0})


# Memory.


def test_sums_decays_and_maxima() -> None:
    def run(memory: str) -> dict[int, float]:
        picture = scored(f"{{signal: attention, memory: {memory}}}")
        picture.prompt([1], [0.5, 0.5])
        picture.say([0.2, 0.4, 0.4])
        return scores(picture.say([0.1, 0.1, 0.4, 0.4]), "all")

    assert run("none") == {0: 0.1, 1: 0.1, 2: 0.4, 3: 0.4}
    assert run("sum") == {0: 0.8, 1: 1.0, 2: 0.8, 3: 0.4}
    assert run("{decay: 0.5}") == {0: 0.325, 1: 0.425, 2: 0.6, 3: 0.4}
    assert run("{max-decay: 0.5}") == {0: 0.125, 1: 0.2, 2: 0.4, 3: 0.4}


def test_last_hit_is_the_time_of_entry_or_of_the_last_hit() -> None:
    picture = scored("{signal: attention, hit: {above: 0.3}, memory: last-hit}")
    picture.prompt([1], [0.5, 0.5])
    picture.say([0.5, 0.4, 0.1])
    picture.say([0.5, 0.1, 0.1, 0.3])
    assert scores(picture.say([0.1, 0.1, 0.1, 0.6, 0.1]), "all") == {0: 2, 1: 1, 2: 1, 3: 3, 4: 3}


def test_recurrence() -> None:
    picture = scored("{signal: attention, hit: {above: 0.3}, memory: {recurrence: 1}}")
    picture.prompt([1])
    for row in ([0.1, 0.9], [0.1, 0.1, 0.8], [0.4, 0.1, 0.1, 0.4], [0.1, 0.7, 0.1, 0.05, 0.05]):
        step = picture.say(row)  # 0 is hit at t = 3 (a gap of 3), 1 at 1 and 4 (gaps of 0 and 3), 2 at 2, 3 at 3

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert scores(step, "all") == pytest.approx(
        {
            0: 2 * sigmoid(-1 / 3) + 2 * sigmoid(-3),
            1: 1 + 2 * sigmoid(-3),
            2: 2 * sigmoid(-2),
            3: 2 * sigmoid(-1),
            4: 1,
        },
        abs=1e-8,
    )


@pytest.mark.parametrize(("update", "said"), [("{every: 9}", [0.4, 0.4, 0.2]), ("prompt-end", [0.0, 0.0, 0.0])])
def test_memory_takes_in_every_pass_but_for_prompt_end_only_prompts(update: str, said: list[float]) -> None:
    run = Picture(f"all: {{admit: all, budget: 60, update: {update}, scorer: {{signal: attention, memory: sum}}}}")
    run.prompt([1], more=True)  # a chunk counts, too
    run.prompt([0.2, 0.8])
    run.say([0.4, 0.4, 0.2])
    run.prompt([0, 0, 0, 1])
    expected = {0: 1.2 + said[0], 1: 0.8 + said[1], 2: said[2], 3: 1.0}
    assert run.oracle.memories(0, 0)[0, "all", 0] == pytest.approx(expected)


def test_memory_of_the_last_queries_folds_when_the_pool_updates() -> None:
    run = Picture("""
        all: {admit: all, budget: 60, update: {every: 2}, scorer: {signal: attention, queries: {last: 2}, memory: sum}}
    """)
    run.prompt([1], [0.5, 0.5])  # the mean of both rows: 0.75, 0.25
    run.say([1, 0, 0])
    step = run.say([0, 0, 0, 1])  # t = 2: the mean of the last two: 0.5, 0, 0, 0.5
    assert scores(step, "all") == {0: 1.25, 1: 0.25, 2: 0, 3: 0.5}


def test_a_page_remembers_from_its_first_token_on() -> None:
    scorer = "{signal: attention, hit: {above: 0.9}, memory: last-hit}"
    run = Picture(f"all: {{admit: all, page: 2, budget: 60, scorer: {scorer}}}")
    for _ in range(4):
        step = run.say()
    assert scores(step, "all") == {0: 1}  # entered at t = 1; 2, entered at 3, is the newest page
    assert scores(run.say(), "all") == {0: 1, 2: 3}


# Sums, products, weights.


def test_scorers_combine() -> None:
    rows = [1], [0.25, 0.75]
    parts = "[{signal: recency, weight: 0.5}, {signal: attention, weight: -2}]"
    assert prompted(f"{{sum: {parts}}}", *rows) == {0: -0.5, 1: -1.0}
    assert prompted(f"{{product: {parts}, weight: 10}}", *rows) == {0: 0, 1: 10 * 0.5 * -1.5}


def test_every_leaf_of_a_sum_has_its_own_memory() -> None:
    leaves = (
        "{signal: attention, memory: sum, weight: 100}",
        "{signal: attention, hit: {above: 0.5}, memory: last-hit, weight: 10}",
        "{signal: attention}",
    )
    run = scored(f"{{sum: [{', '.join(leaves)}]}}")
    run.prompt([1], [0.5, 0.5])
    assert scores(run.say([0.6, 0.2, 0.2]), "all") == {0: 110 + 10 + 0.6, 1: 70 + 0 + 0.2, 2: 20 + 10 + 0.2}


def test_what_is_not_given_is_asked_for() -> None:
    with pytest.raises(ValueError, match="looks at keys"):
        prompted("{signal: key-norm}", [1])
    with pytest.raises(ValueError, match="looks at values"):
        oracle = Oracle(plan_of("all: {admit: all, budget: 1, scorer: {signal: value-norm}}"))
        oracle.step(0, [np.ones((1, 2, 4))], [np.ones((1, 2, 4))])


def test_decisions_use_the_scorer() -> None:
    run = Picture("all: {admit: all, budget: 2, scorer: {signal: attention, queries: all, memory: sum}}")
    run.prompt([1], [0.6, 0.4], [0.1, 0.2, 0.7])
    assert resident(run.say([0.5, 0.1, 0.3, 0.1])) == [0, 2] and kept(run.say(), "all") == [0, 2]
