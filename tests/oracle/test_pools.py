"""Who enters, who is safe, who goes and when: small cases worked out by hand."""

import numpy as np
import pytest

from kvpolicy.oracle import Oracle
from tests.oracle.kit import Picture, kept, plan_of, resident, scores


def test_a_pool_without_budget_keeps_everything() -> None:
    run = Picture("all: {admit: all}")
    run.tokens(3)
    run.say()
    assert resident(run.say()) == [0, 1, 2, 3, 4]


def test_without_a_scorer_the_oldest_goes() -> None:
    run = Picture("all: {admit: all, budget: 3}")
    assert resident(run.tokens(5)) == [2, 3, 4]
    assert resident(run.say()) == [3, 4, 5]


def test_pools_are_read_top_down() -> None:
    run = Picture("""
        marked: {admit: {tokens: special}}
        pictures: {admit: {modality: image}}
        prompt: {admit: prompt}
        rest: {admit: generated, budget: 1}
    """)
    run.tokens(4, special=[0, 1, 0, 1], modality=[None, "image", "image", None])
    step = run.say()
    assert [kept(step, pool) for pool in ("marked", "pictures", "prompt", "rest")] == [[1, 3], [2], [0], [4]]


def test_a_generated_token_is_neither_special_nor_an_image() -> None:
    run = Picture("""
        marked: {admit: {tokens: special}}
        pictures: {admit: {modality: image}}
        rest: {admit: all, budget: 2, pinned: {tokens: special}}
    """)
    run.tokens(1)
    for _ in range(2):
        step = run.say(special=[1], modality=["image"])
    assert [kept(step, pool) for pool in ("marked", "pictures", "rest")] == [[], [], [1, 2]]
    run.tokens(2, special=[1, 0], modality=["image", "image"])
    step = run.say()
    assert [kept(step, pool) for pool in ("marked", "pictures", "rest")] == [[3], [4], [2, 5]]


def test_a_token_that_no_pool_admits_is_an_error() -> None:
    oracle = Oracle(plan_of("all: {admit: all}"))
    del oracle.layers[0][0].heads[0]["all"]
    with pytest.raises(ValueError, match="no pool admits the prompt token at position 0"):
        oracle.step(0, None, None, logits=[np.zeros((1, 2, 2))])


def test_attention_decides_and_the_newest_is_not_safe_by_itself() -> None:
    run = Picture("all: {admit: all, budget: 3, scorer: {signal: attention}}")
    assert resident(run.prompt([1], [1], [1], [0.4, 0.1, 0.3, 0.2])) == [0, 2, 3]
    assert resident(run.say([0.3, 0, 0.4, 0.2, 0.1])) == [0, 2, 3]  # the token just admitted, 4, is the lowest
    assert resident(run.say([0.1, 0, 0.4, 0.2, 0, 0.3])) == [2, 3, 5]


def test_probabilities_are_taken_over_residents_alone() -> None:
    run = Picture("all: {admit: all, budget: 2, scorer: {signal: attention}}")
    run.prompt([1], [1], [0.6, 0.3, 0.1])
    step = run.say([0.2, 0.2, 0.5, 0.1])  # position 2 is gone: 0.2, 0.2 and 0.1 are renormalised
    assert scores(step, "all") == {0: 0.4, 1: 0.4, 3: 0.2}
    np.testing.assert_allclose(step.probabilities[0][0, 0], [0.4, 0.4, 0.2])


def test_among_equals_the_older_goes() -> None:
    run = Picture("all: {admit: all, budget: 2, scorer: {signal: attention}}")
    assert resident(run.tokens(4)) == [2, 3]


def test_first_and_window_are_safe() -> None:
    run = Picture("""
        all:
          admit: all
          budget: 4
          pinned: {first: 1}
          window: 2
          scorer: {signal: attention}
    """)
    step = run.prompt([1], [1], [1], [1], [0.0, 0.5, 0.3, 0.2, 0.0])
    assert resident(step) == [0, 1, 3, 4] and scores(step, "all") == {1: 0.5, 2: 0.3}
    step = run.say([0, 0.1, 0, 0.9, 0, 0])  # the newest two, 4 and 5, are safe with 0: 3 beats 1
    assert resident(step) == [0, 3, 4, 5]
    assert sorted(step.heads[0]["all"].protected) == [0, 4, 5]


def test_protected_tokens_may_exceed_the_budget() -> None:
    run = Picture("all: {admit: all, budget: 2, pinned: {tokens: special}, window: 1}")
    assert resident(run.tokens(5, special=[1, 1, 1, 0, 0])) == [0, 1, 2, 4]
    assert resident(run.say()) == [0, 1, 2, 5]


def test_special_tokens_and_survivors() -> None:
    run = Picture("all: {admit: all, budget: 2, pinned: {tokens: special}}")
    assert resident(run.tokens(4, special=[0, 1, 0, 0])) == [1, 3]
    assert resident(run.say()) == [1, 4]
    run = Picture("all: {admit: all, budget: 3, pinned: survivors}")
    assert resident(run.tokens(4)) == [1, 2, 3]  # were once through an update: safe from here on
    step = run.say()
    assert resident(step) == [1, 2, 3] and step.heads[0]["all"].choice.scores == {4: 4.0}


def test_window_is_counted_in_its_own_pool() -> None:
    run = Picture("""
        marked: {admit: {tokens: special}}
        rest: {admit: all, budget: 2, window: 2, scorer: {signal: recency, weight: -1}}
    """)
    step = run.tokens(5, special=[0, 0, 0, 1, 1])
    assert kept(step, "rest") == [1, 2] and kept(step, "marked") == [3, 4]


def test_budgets_read_the_clock_after_the_pass() -> None:
    run = Picture("all: {admit: all, budget: prompt_len + t // 2}")
    assert resident(run.tokens(3)) == [0, 1, 2]
    assert [len(resident(run.say())) for _ in range(5)] == [3, 4, 4, 5, 5]
    run = Picture("all: {admit: all, budget: 50% * context}")
    assert len(resident(run.tokens(5))) == 2
    assert [len(resident(run.say())) for _ in range(4)] == [3, 3, 4, 4]


def test_size_is_what_the_last_update_left_and_seen_what_ever_entered() -> None:
    run = Picture("""
        rest: {admit: generated, budget: 6 - size(prompt)}
        prompt: {admit: prompt, budget: 4}
    """)
    assert kept(run.tokens(3), "prompt") == [0, 1, 2]
    for _ in range(5):
        step = run.say()
    assert kept(step, "rest") == [5, 6, 7]
    assert step.heads[0]["prompt"].size == 3
    step = run.tokens(2)  # the prompt pool now holds 4, and is updated before the pool that asks for its size
    assert kept(step, "prompt") == [1, 2, 8, 9] and kept(step, "rest") == [6, 7]
    run = Picture("all: {admit: all, budget: seen(all) // 2}")
    assert [len(resident(run.tokens(4))), len(resident(run.say())), len(resident(run.say()))] == [2, 2, 3]


def test_cadences() -> None:
    run = Picture("all: {admit: all, budget: 2, update: {every: 3}}")
    assert [len(resident(s)) for s in [run.tokens(4), *(run.say() for _ in range(7))]] == [2, 3, 4, 2, 3, 4, 2, 3]
    run = Picture("all: {admit: all, budget: 2, update: prompt-end}")
    assert [len(resident(s)) for s in [run.tokens(4), run.say(), run.say(), run.tokens(1)]] == [2, 3, 4, 2]


def test_a_turn_updates_at_its_last_pass() -> None:
    run = Picture("all: {admit: all, budget: 2}")
    assert [len(resident(run.tokens(3, more=True))), len(resident(run.tokens(3)))] == [3, 2]
    chunked = Picture("all: {admit: all, budget: 2}", "prompt_chunk: 3")
    assert [len(resident(chunked.tokens(3, more=True))), len(resident(chunked.tokens(3)))] == [2, 2]


def test_the_kind_of_a_pass_is_told_by_its_length_unless_said() -> None:
    oracle = Oracle(plan_of("all: {admit: all}"))
    one = [np.zeros((1, 1, 4))]
    kinds = [oracle.step(0, None, None, logits=one)[0].kind]
    kinds += [oracle.step(0, None, None, logits=one)[0].kind]
    kinds += [oracle.step(0, None, None, logits=one, kind="prompt", more=True)[0].kind]
    kinds += [oracle.step(0, None, None, logits=one)[0].kind]
    assert kinds == ["prompt", "generated", "prompt", "prompt"]
    with pytest.raises(ValueError, match="one token a row"):
        oracle.step(0, None, None, logits=[np.zeros((1, 2, 6))], kind="generated")


def test_a_pool_may_be_emptied() -> None:
    run = Picture('all: {admit: all, budget: "if(t < 2, 0, 2)"}')
    assert [resident(s) for s in [run.tokens(3), run.say(), run.say(), run.say()]] == [[], [], [4], [4, 5]]


# Pages.

PAGED = "all: {admit: all, page: 2, budget: 4, scorer: {signal: attention}}"


def test_pages_go_whole_by_their_best_token_and_the_newest_stays() -> None:
    run = Picture(PAGED)
    step = run.prompt(*[[1]] * 5, [0.1, 0.3, 0.2, 0.2, 0.1, 0.1])
    assert scores(step, "all") == {0: 0.3, 2: 0.2}  # pages by their first token; 4 is the newest page
    assert resident(step) == [0, 1, 4, 5]
    step = run.say([0.1, 0.1, 0, 0, 0.5, 0.3, 0])  # opens a page, which counts whole: 6 tokens, 2 too many
    assert resident(step) == [4, 5, 6]
    assert step.heads[0]["all"].units == {4: (4, 5), 6: (6,)} and step.heads[0]["all"].size == 4


def test_a_turn_closes_the_open_page() -> None:
    run = Picture("all: {admit: all, page: 4}")
    run.tokens(3)
    run.say()
    assert run.say().heads[0]["all"].units == {0: (0, 1, 2, 3), 4: (4,)}
    assert run.tokens(1, more=True).heads[0]["all"].units == {0: (0, 1, 2, 3), 4: (4,), 5: (5,)}
    assert run.tokens(1).heads[0]["all"].units == {0: (0, 1, 2, 3), 4: (4,), 5: (5, 6)}


def test_a_page_is_safe_if_any_of_its_tokens_is() -> None:
    run = Picture("all: {admit: all, page: 4, budget: 8, pinned: {first: 1}, window: 3}")
    step = run.tokens(14)  # pages 0-3, 4-7, 8-11, 12-13; the window holds 11, 12 and 13
    assert sorted(step.heads[0]["all"].choice.protected) == [0, 8, 12]
    assert resident(step) == [0, 1, 2, 3, 8, 9, 10, 11, 12, 13]


def test_a_budget_is_whole_pages() -> None:
    run = Picture("all: {admit: all, page: 4, budget: 11}")
    assert resident(run.tokens(12)) == [4, 5, 6, 7, 8, 9, 10, 11]


# More than one KV head, layer, row.


def test_each_head_keeps_its_own_or_all_keep_one_set() -> None:
    passes = [[[1], [1], [0.5, 0.3, 0.2]], [[1], [1], [0.1, 0.4, 0.5]]]
    own = Picture("all: {admit: all, budget: 2, scorer: {signal: attention}}", query_heads=2, kv_heads=2)
    step = own.heads(*passes, kind="prompt")
    assert [resident(step, 0), resident(step, 1)] == [[0, 1], [1, 2]]
    one = Picture(
        "all: {admit: all, budget: 2, scorer: {signal: attention}, evict: {scope: layer}}", query_heads=2, kv_heads=2
    )
    step = one.heads(*passes, kind="prompt")
    assert [resident(step, 0), resident(step, 1)] == [[1, 2], [1, 2]]
    assert scores(step, "all", 0) == {0: 0.3, 1: 0.35, 2: 0.35} == scores(step, "all", 1)


@pytest.mark.parametrize(
    ("floor", "first", "second"), [("0", [1, 2, 3], [1]), ("100%", [2, 3], [0, 1]), ("50%", [1, 2, 3], [0, 1])]
)
def test_heads_share_a_budget(floor: str, first: list[int], second: list[int]) -> None:
    """Budget 2 a head; of the best 4 of all, three are the first head's: 3 and 1, with floor f round((1-f)w + 2f)."""
    evict = f"{{scope: across-heads, floor: {floor}}}"
    pools = f"all: {{admit: all, budget: 2, scorer: {{signal: attention}}, evict: {evict}}}"
    run = Picture(pools, query_heads=2, kv_heads=2)
    step = run.heads([[1], [1], [1], [0.1, 0.2, 0.3, 0.4]], [[1], [1], [1], [0.12, 0.7, 0.09, 0.09]], kind="prompt")
    assert [resident(step, 0), resident(step, 1)] == [first, second]


def test_layers_and_heads_may_have_their_own_answers() -> None:
    plan = plan_of(
        "all: {admit: all, budget: 2}",
        """
        overrides:
          - {layers: 0, dense: true}
          - {heads: [[1, 1]], pools: {all: {budget: 3}}}
        """,
        layers=2,
        query_heads=2,
        kv_heads=2,
    )
    oracle = Oracle(plan)
    logits = [np.zeros((2, 5, 5))]
    first, second = (oracle.step(layer, None, None, logits=logits)[0] for layer in range(2))
    assert resident(first) == [0, 1, 2, 3, 4]
    assert [resident(second, 0), resident(second, 1)] == [[3, 4], [2, 3, 4]]


def test_rows_have_their_own_clocks() -> None:
    oracle = Oracle(plan_of("all: {admit: all, budget: prompt_len + t}"), rows=2)
    oracle.step(0, None, None, logits=[np.zeros((1, 3, 3)), np.zeros((1, 0, 0))], more=True)
    steps = oracle.step(0, None, None, logits=[np.zeros((1, 2, 5)), np.zeros((1, 2, 2))])
    assert [(step.prompt_len, resident(step)) for step in steps] == [(5, [0, 1, 2, 3, 4]), (2, [0, 1])]


# Moving on, reading, storing, rotating.


def test_what_is_dropped_may_move_on() -> None:
    run = Picture("""
        recent: {admit: all, budget: 2, evict: {to: old}}
        old: {budget: 2, scorer: {signal: attention}}
    """)
    step = run.tokens(3)
    assert [kept(step, "recent"), kept(step, "old")] == [[1, 2], [0]]
    run.say()
    step = run.say([0.1, 0.3, 0.5, 0, 0.1])
    # 2 has just moved to the older pool, and takes part in its update at once.
    assert [kept(step, "recent"), kept(step, "old")] == [[3, 4], [1, 2]]
    assert step.heads[0]["recent"].evicted == {2} and step.heads[0]["old"].evicted == {0}


def test_a_fed_pool_counts_first_and_window_among_its_residents() -> None:
    run = Picture("""
        recent: {admit: all, budget: 1, scorer: {signal: attention}, evict: {to: old}}
        old: {budget: 2, pinned: {first: 1}, window: 1, scorer: {signal: attention}}
    """)
    step = run.prompt([1], [1], [1], [0.1, 0.6, 0.2, 0.1])  # 0, 2 and 3 move; the first is 0, the newest is 3
    assert [kept(step, "recent"), kept(step, "old")] == [[1], [0, 3]]
    step = run.say([0.1, 0.1, 0, 0, 0.8])  # 1 moves, and stands second by position, after arriving last
    assert [kept(step, "recent"), kept(step, "old")] == [[4], [0, 3]]


def test_memory_starts_anew_in_another_pool() -> None:
    run = Picture("""
        recent: {admit: all, budget: 1, scorer: {signal: attention, memory: sum}, evict: {to: old}}
        old: {budget: 9, scorer: {signal: attention, memory: sum}}
    """)
    run.prompt([1], [0.9, 0.1])  # 1 moves on
    run.prompt([0.2, 0.3, 0.5])  # 0 has 1.1 by now; 2 moves on
    step = run.say([0.1, 0.3, 0.2, 0.4])
    assert run.oracle.memories(0, 0)[0, "old", 0] == pytest.approx({1: 0.6, 2: 0.2})
    assert kept(step, "old") == [1, 2, 3]


def test_reading_takes_the_newest_page_and_the_best_others() -> None:
    run = Picture("all: {admit: all, page: 2, read: {top: 4, scorer: {signal: attention}}}")
    step = run.tokens(6)
    assert sorted(step.heads[0]["all"].read) == [0, 1, 2, 3, 4, 5]  # prompts read everything
    step = run.say([0.1, 0.1, 0.3, 0.1, 0.2, 0.1, 0.1])
    assert sorted(step.heads[0]["all"].read) == [2, 3, 6]
    np.testing.assert_allclose(step.probabilities[0][0, 0], [0, 0, 0.6, 0.2, 0, 0, 0.2])


def test_unread_tokens_are_not_attended_by_scorers() -> None:
    run = Picture("""
        all: {admit: all, budget: 3, read: {top: 2, scorer: {signal: recency}}, scorer: {signal: attention}}
    """)
    run.tokens(3)
    step = run.say([0.7, 0.1, 0.1, 0.1])
    assert scores(step, "all") == {0: 0, 1: 0, 2: 0.5, 3: 0.5} and resident(step) == [1, 2, 3]


def test_compact_positions_are_ranks_among_residents() -> None:
    """The vectors say where they were turned to: a query's logit is then 10 times its own rank plus the key's."""

    def rotate(vectors: np.ndarray, positions: np.ndarray) -> np.ndarray:
        turned = np.zeros_like(vectors)
        turned[..., 0] = np.where(vectors[..., 0] == 1, 1.0, 10.0 * positions)  # [1, ...] marks a key
        turned[..., 1] = np.where(vectors[..., 0] == 1, positions, 1.0)
        return turned

    plan = plan_of(
        "all: {admit: all, budget: 3, pinned: {first: 1}, scorer: {signal: attention-logit, weight: -1}}",
        "positions: compact",
        head_dim=2,
    )
    oracle = Oracle(plan, rotate=rotate)
    query, key = np.zeros((1, 5, 2)), np.ones((1, 5, 2))
    step = oracle.step(0, [query], [key], scaling=1.0)[0]
    assert scores(step, "all") == {1: -41, 2: -42, 3: -43, 4: -44} and resident(step) == [0, 1, 2]
    step = oracle.step(0, [query[:, :1]], [key[:, :1]], scaling=1.0)[0]  # position 5 has rank 3
    assert scores(step, "all") == {1: -31, 2: -32, 5: -33}
    with pytest.raises(ValueError, match="compact"):
        Oracle(plan)


def test_stored_tokens_are_rounded_in_groups_of_channels() -> None:
    plan = plan_of("all: {admit: all, store: {bits: 2, group: 2, keys: token, values: token}}", head_dim=4)
    oracle = Oracle(plan)
    key = np.array([[[0.0, 3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    value = np.array([[[0.0, 9.0, 4.0, 1.0], [3.0, 1.4, 0.0, 0.0]]])
    query = np.array([[[0.0] * 4] * 2])
    step = oracle.step(0, [query], [key], [value])[0]
    np.testing.assert_allclose(step.output[1, 0], (value[0, 0] + value[0, 1]) / 2)  # this pass sees them as they were
    step = oracle.step(0, [query[:, :1]], [np.zeros((1, 1, 4))], [np.zeros((1, 1, 4))])[0]
    # four levels from 0 to 9, from 1 to 4, from 1.4 to 3: all ends of their groups
    np.testing.assert_allclose(step.output[0, 0], [(0 + 3) / 3, (9 + 1.4) / 3, 4 / 3, 1 / 3])


def test_a_stored_page_is_rounded_once_it_is_full_or_closed() -> None:
    plan = plan_of("all: {admit: all, page: 3, store: {bits: 2, group: 3, keys: channel, values: channel}}", head_dim=4)
    oracle = Oracle(plan)

    def say(*values: float) -> np.ndarray:
        column = np.array([[[value] * 4 for value in values]])
        oracle.step(0, [0 * column], [0 * column], [column])
        return oracle.layers[0][0].text.values[0, :, 0]

    say(0.0, 1.4)
    np.testing.assert_allclose(say(3.0), [0, 1.4, 3])  # the pass that fills the page sees it unrounded
    np.testing.assert_allclose(say(5.0), [0, 1, 3, 5])
    say(6.2)
    np.testing.assert_allclose(say(8.0, 9.0), [0, 1, 3, 5, 6.2, 8, 9])  # a turn closes the page before it
    np.testing.assert_allclose(say(7.0), [0, 1, 3, 5, 6.2, 8, 9, 7])  # of two numbers both are ends
    np.testing.assert_allclose(say(0.0), [0, 1, 3, 5, 6.2, 7 + 4 / 3, 9, 7, 0])


def test_a_page_that_moves_is_rounded_although_it_is_not_full() -> None:
    plan = plan_of("""
        recent: {admit: all, page: 3, budget: 3, evict: {to: old}}
        old: {page: 3, store: {bits: 2, group: 3, keys: channel, values: channel}}
    """, head_dim=4)  # fmt: skip
    oracle = Oracle(plan)

    def say(*values: float) -> np.ndarray:
        column = np.array([[[value] * 4 for value in values]])
        oracle.step(0, [0 * column], [0 * column], [column])
        return oracle.layers[0][0].text.values[0, :, 0]

    say(0.0, 1.4, 3.0)
    np.testing.assert_allclose(say(5.0), [0, 1.4, 3, 5])  # moves now
    np.testing.assert_allclose(say(5.0), [0, 1, 3, 5, 5])
