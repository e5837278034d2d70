"""The comparison itself: a float32 runtime is played by a second oracle, honest, rounded, or wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from kvpolicy.oracle import Oracle, Step
from kvpolicy.plan import Plan
from kvpolicy.testing.agreement import Agreement, Disagreement, array
from kvpolicy.testing.float32 import RELATIVE, grain
from tests.oracle.kit import plan_of

H2O = "all: {admit: all, budget: 6, window: 2, scorer: {signal: attention, queries: all, memory: sum}}"
PAGES = """
    prompt: {admit: prompt, page: 2}
    rest:
      admit: generated
      page: 2
      budget: 6
      scorer: {signal: page-bound, heads: max, hit: {top: 50%}, memory: last-hit}
"""
HEADS = "all: {admit: all, budget: 5, scorer: {signal: attention}, evict: {scope: across-heads, floor: 40%}}"

Edit = Callable[[int, Step, list[list[set[int]]]], None]


class Runtime:
    """Another oracle of the same plan; it lays what it keeps into slots, as a runtime would.

    ``noise`` disturbs its keys by that share, as rounding does; ``edit`` (pass, step, kept sets by head and pool) may
    change what it claims to keep.
    """

    def __init__(self, plan: Plan, noise: float = 0.0, edit: Edit | None = None) -> None:
        self.plan, self.noise, self.edit = plan, noise, edit
        self.oracle = Oracle(plan)
        self.passes = 0

    def run(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, kind: str) -> np.ndarray:
        """[1, K, S] positions after the pass."""
        disturbed = key * (1 + self.noise * np.random.default_rng(self.passes).normal(size=key.shape))
        step = self.oracle.step(0, [query], [disturbed], [value], kind=kind)[0]
        self.passes += 1
        layer = self.plan.layers[0]
        kept = [[set(pools[pool.name].kept) for pool in layer.pools] for pools in step.heads]
        if self.edit is not None:
            self.edit(self.passes, step, kept)
        slots = np.full((1, len(kept), layer.slots + 50), -1)
        for head, pools in enumerate(kept):
            for pool, positions in zip(layer.pools, pools, strict=True):
                held = sorted(positions, key=lambda p: p * 7 % 11)[: pool.capacity]  # slots have no order
                slots[0, head, pool.offset : pool.offset + len(held)] = held
        return slots


def compare(pools: str, noise: float = 0.0, edit: Edit | None = None, steps: int = 40, seed: int = 0) -> Agreement:
    """Run both on random text."""
    plan = plan_of(pools, query_heads=4, kv_heads=2, head_dim=4, prompt=8, new=steps)
    agreement, runtime, random = Agreement(plan), Runtime(plan, noise, edit), np.random.default_rng(seed)
    for number in range(steps + 1):
        kind, new = ("generated", 1) if number else ("prompt", 8)
        query, key, value = (random.normal(size=(heads, new, 4)).astype(np.float32) for heads in (4, 2, 2))
        positions = runtime.run(query, key, value, kind)
        agreement.check(0, query[None], key[None], value[None], positions)
    return agreement


@pytest.mark.parametrize("pools", [H2O, PAGES, HEADS])
def test_a_runtime_that_keeps_the_same_agrees(pools: str) -> None:
    agreement = compare(pools)
    assert agreement.compared == 82 and not agreement.near_ties
    assert agreement.summary() == "82 kept sets compared, 0 near-ties"


@pytest.mark.parametrize("pools", [H2O, PAGES, HEADS])
def test_a_runtime_that_rounds_agrees_or_is_counted(pools: str) -> None:
    assert all(compare(pools, noise=1e-7, seed=seed).compared == 82 for seed in range(3))


def test_a_runtime_that_is_off_by_more_than_rounding_is_caught() -> None:
    with pytest.raises(Disagreement):
        for seed in range(5):
            compare(HEADS, noise=1e-2, seed=seed)


def exchanged(at: int) -> Edit:
    """From pass ``at`` on, the first head keeps its oldest dropped token instead of a candidate it should keep."""

    def edit(number: int, step: Step, kept: list[list[set[int]]]) -> None:
        choice = step.heads[0]["all"].choice
        if number >= at and choice is not None:
            kept[0][0] ^= {min(choice.dropped), max(choice.scores, key=choice.scores.__getitem__)}

    return edit


def test_a_wrong_choice_is_shown_with_its_reasons() -> None:
    with pytest.raises(Disagreement) as caught:
        compare(H2O, edit=exchanged(at=6))
    message = str(caught.value)
    lines = "kept by the oracle alone", "kept by the runtime alone", "protected units [11, 12]", "lowest first"
    assert "layer 0, row 0, KV head 0, pool all, t 5 (generated pass, prompt_len 8)" in message
    assert all(line in message for line in lines)


def test_keeping_too_few_or_too_many_is_no_near_tie() -> None:
    def fewer(number: int, step: Step, kept: list[list[set[int]]]) -> None:
        if number == 3:
            kept[1][0].discard(max(kept[1][0] - step.heads[1]["all"].protected))

    def more(number: int, step: Step, kept: list[list[set[int]]]) -> None:
        if number == 3:
            kept[1][0] |= step.heads[1]["all"].evicted

    even = "all: {admit: all, budget: 6, window: 2, scorer: {signal: attention, heads: sum, weight: 0.0000001}}"
    for edit in (fewer, more):
        with pytest.raises(Disagreement, match="KV head 1"):
            compare(even, edit=edit)


def test_dropping_a_protected_token_is_no_near_tie() -> None:
    def edit(number: int, step: Step, kept: list[list[set[int]]]) -> None:
        if number == 4:
            kept[0][0] = kept[0][0] - {max(kept[0][0])} | step.heads[0]["all"].evicted

    with pytest.raises(Disagreement):
        compare(H2O, edit=edit)


def one(pools: str, logits: Mapping[int, float], positions: list[int], agreement: Agreement | None = None) -> Agreement:
    """One prompt pass with these scaled logits of the newest query, after which a runtime holds ``positions``."""
    agreement = agreement or Agreement(plan_of(pools, head_dim=1, prompt=len(logits)))
    key = np.array([[list(logits.values())]]).swapaxes(1, 2)[None]
    agreement.check(0, np.ones_like(key), key, key, np.array([[positions]]), scaling=1.0)
    return agreement


def test_a_near_tie_is_counted_shown_and_adopted() -> None:
    pools = "all: {admit: all, budget: 3, window: 1, scorer: {signal: attention}}"
    logits = {0: 2.0, 1: 0.0, 2: RELATIVE / 2, 3: 0.0}
    assert not one(pools, logits, [0, 2, 3]).near_ties
    agreement = one(pools, logits, [0, 1, 3])
    (tie,) = agreement.near_ties
    assert (tie.oracle, tie.runtime, tie.hit) == ((1,), (2,), False)
    assert tie.bound / 4 < tie.gap < tie.bound
    assert "t 0: oracle drops [1], runtime [2] (scores" in agreement.summary()
    key = np.zeros((1, 1, 1, 1))
    agreement.check(0, key + 1, key, key, np.array([[[4, 0, 3]]]))  # of 1, which was adopted, and 3 the older goes
    assert len(agreement.near_ties) == 1
    far = {**logits, 2: RELATIVE * 2}
    with pytest.raises(Disagreement):
        one(pools, far, [0, 1, 3])


def test_the_bound_is_of_the_scores_compared_not_of_the_greatest() -> None:
    pools = "all: {admit: all, budget: 3, window: 1, scorer: {signal: attention}}"
    with pytest.raises(Disagreement):  # both are a ten-thousandth of the greatest, yet 10% apart
        one(pools, {0: 10.0, 1: 0.0, 2: 0.1, 3: 0.0}, [0, 1, 3])
    logits = "all: {admit: all, budget: 3, window: 1, scorer: {signal: attention-logit}}"
    assert len(one(logits, {0: 10.0, 1: 0.0, 2: 1e-5, 3: 0.0}, [0, 1, 3]).near_ties) == 1


def test_scores_that_float32_holds_exactly_have_no_near_ties() -> None:
    for scorer in ("{signal: recency}", "{signal: attention, hit: {above: 2}, memory: last-hit}"):
        pools = f"all: {{admit: all, budget: 3, scorer: {scorer}}}"
        one(pools, dict.fromkeys(range(4), 0.0), [1, 2, 3])
        with pytest.raises(Disagreement):  # nobody was ever hit, all tie, and yet the oldest is not the one to go
            one(pools, dict.fromkeys(range(4), 0.0), [0, 2, 3])


HITS = "all: {admit: all, budget: 3, scorer: {signal: attention, hit: {above: 0.25}, memory: %s}}"


def test_a_hit_on_the_boundary_excuses_what_follows_from_it() -> None:
    """Four even tokens have 0.25 each, on the bar: whoever is said to be hit, float32 may see it otherwise."""
    pools = HITS % "sum"
    even = dict.fromkeys(range(4), 0.0)
    assert not one(pools, even, [1, 2, 3]).near_ties
    assert [tie.hit for tie in one(pools, even, [0, 1, 2]).near_ties] == [True]
    with pytest.raises(Disagreement):  # 2 is hit beyond doubt
        one(pools, {0: 0.0, 1: 0.0, 2: 1.0, 3: 0.0}, [0, 1, 3])


def test_memories_are_compared_and_those_on_the_boundary_adopted() -> None:
    agreement, zero = Agreement(plan_of(HITS % "last-hit", head_dim=1)), np.zeros((1, 1, 1, 1))

    def say(stamps: dict[int, float | tuple[int, int]]) -> dict[int, float | tuple[int, int]]:
        agreement.check(0, zero, zero, zero, np.array([[list(stamps)]]), memory=[{(0, "all", 0): stamps}])
        return dict(agreement.oracle.memories(0, 0)[0, "all", 0])

    for stamps in ({0: 0}, {0: 1, 1: 1}, {0: 2, 1: 2, 2: 2}):
        assert say(dict(stamps)) == stamps
    # Four even tokens have 0.25 each, on the bar. The oracle hits all at t = 3 and drops 0; the runtime hits 0 and 2.
    assert say({0: 3, 2: 3, 3: 3}) == {0: 3, 2: 3, 3: 3} and [tie.hit for tie in agreement.near_ties] == [True]
    assert say({2: 3, 3: 4, 4: 4}) == {2: 3, 3: 4, 4: 4}  # nor need it hit 2 at t = 4
    zero = zero + 1  # from now on, the newest token outweighs the others
    with pytest.raises(Disagreement, match="position 4 remembers 5, the oracle's 4"):
        say({3: 4, 4: 5, 5: 5})


def test_a_position_in_two_slots_is_refused() -> None:
    with pytest.raises(Disagreement, match=r"positions \[2\] lie in two slots"):
        one(H2O, dict.fromkeys(range(3), 0.0), [0, 1, 2, 2])


def test_outputs_are_compared() -> None:
    plan = plan_of("all: {admit: all}", head_dim=2)
    key = np.array([[[[1.0, 0.0], [3.0, 0.0]]]])
    query, right = np.zeros_like(key), np.array([[[[1.0, 0.0]], [[2.0, 0.0]]]])
    Agreement(plan).check(0, query, key, key, None, output=right)
    with pytest.raises(Disagreement, match=r"attention is 0\.25 off"):
        Agreement(plan).check(0, query, key, key, None, output=right + np.array([0.5, 0]))


def test_padding_is_left_out() -> None:
    plan = plan_of("all: {admit: all, budget: 2}", head_dim=2)
    agreement = Agreement(plan, rows=2)
    key = np.zeros((2, 1, 3, 2))
    valid = np.array([[True, True, True], [False, False, True]])
    steps = agreement.check(0, key, key, key, np.array([[[1, 2]], [[0, -1]]]), valid=valid)
    assert [step.prompt_len for step in steps] == [3, 1] and agreement.compared == 2


def test_tensors_are_taken_as_arrays() -> None:
    torch = pytest.importorskip("torch")
    assert array(torch.ones(2, dtype=torch.bfloat16, requires_grad=True)).dtype == np.float64
    assert array(torch.tensor([True])).dtype == bool


def test_grains() -> None:
    def of(scorer: str) -> str:
        return grain(plan_of(f"all: {{admit: all, budget: 2, scorer: {scorer}}}").layers[0].pools[0].scorer)

    assert of("{signal: attention, memory: {decay: 0.9}}") == "own"
    assert of("{signal: attention, hit: {top: 50%}, memory: {decay: 0.9}}") == "own"
    assert of("{signal: page-bound, hit: {top: 50%}, memory: last-hit}") == "exact"
    assert of("{product: [{signal: attention}, {signal: value-norm}]}") == "own"
    assert of("{sum: [{signal: attention}, {signal: key-anchor, weight: -1}]}") == "greatest"
