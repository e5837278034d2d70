"""Prompt tokens are shared out by what they are: special ones, images, and the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.language import load_policy, loads_policy
from kvpolicy.plan import ModelGeometry, Plan, make_plan
from kvpolicy.runtime import PolicyCache
from kvpolicy.testing.beside import Beside

GEOMETRY = ModelGeometry("random", layers=2, query_heads=4, kv_heads=2, head_dim=8)

MARKED = """
  marks: {admit: {tokens: special}, page: 3}
  images:
    admit: {modality: image}
    page: 2
    budget: 8
    window: 2
    scorer: {signal: attention, queries: all, memory: sum}
    update: prompt-end
  rest: {admit: all, page: 4, budget: 12, scorer: {signal: page-bound, hit: {top: 50%}, memory: last-hit}}
"""
PINNED = """
  images: {admit: {modality: image}, budget: 4, pinned: {tokens: special}, scorer: {signal: attention}}
  prompt: {admit: prompt, budget: 9, page: 3, pinned: {tokens: special}, scorer: {signal: attention, memory: sum}}
  generated: {admit: generated, budget: 'max(3, 16 - size(prompt))', pinned: {first: 1}, window: 1}
"""
TOLD_APART_IN_SOME_LAYERS = """
  images: {admit: {modality: image}, budget: 5, pinned: {first: 2}}
  rest: {admit: all, budget: 10, window: 3, scorer: {signal: attention, memory: sum}}
overrides:
  - {layers: 0, dense: true}
"""


def plan_of(pools: str, **lengths: object) -> Plan:
    return make_plan(loads_policy(f"kvpolicy: 1\nname: told\npools:{pools}"), GEOMETRY, **lengths)  # type: ignore[arg-type]


class Speaker:
    """Random numbers and random flags."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.rows, self.random = rows, torch.Generator().manual_seed(seed)

    def numbers(self, columns: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        def some(heads: int) -> Tensor:
            return torch.randn(self.rows, heads, columns, GEOMETRY.head_dim, generator=self.random)

        return [(2 * some(4), some(2), some(2)) for _ in range(GEOMETRY.layers)]

    def flags(self, columns: int, share: float) -> Tensor:
        return torch.rand(self.rows, columns, generator=self.random) < share

    def prompt(self, beside: Beside, rows: list[int], **how: object) -> None:
        """A pass that brings so many tokens to each row; padding is flagged as well."""
        columns = max(rows)
        valid = torch.arange(columns) >= columns - torch.tensor(rows)[:, None]
        special, images = self.flags(columns, 0.2), self.flags(columns, 0.4)
        beside.feed(self.numbers(columns), valid, kind="prompt", special=special, modality=images.int(), **how)  # type: ignore[arg-type]

    def say(self, beside: Beside, steps: int) -> None:
        for _ in range(steps):
            beside.feed(self.numbers(1))


@pytest.mark.parametrize("pools", [MARKED, PINNED, TOLD_APART_IN_SOME_LAYERS])
def test_ragged_rows_turns_and_chunks_beside_the_oracle(pools: str) -> None:
    beside = Beside(plan_of(pools, batch=3, prompt=(4, 44), max_new_tokens=70, turns=4))
    speaker = Speaker(3)
    speaker.prompt(beside, [13, 2, 7], more=True)
    speaker.prompt(beside, [9, 0, 3], more=True)
    speaker.prompt(beside, [1, 2, 5])
    speaker.say(beside, 17)
    speaker.prompt(beside, [6, 0, 9])
    speaker.say(beside, 10)
    speaker.prompt(beside, [1, 5, 0])
    speaker.say(beside, 10)
    assert beside.agreement.compared == 40 * 3 * GEOMETRY.layers * GEOMETRY.kv_heads
    assert all(
        counts["evicted"] > 0 for name, counts in beside.cache.stats()["pools"].items() if name not in ("marks", "all")
    )
    assert beside.cache.bytes == beside.plan.bytes
    for layer in beside.cache.layers:
        for pool in layer.plan.pools:
            assert int((layer.state.pool_positions(pool)[..., 0] >= 0).sum(-1).max()) * pool.page <= pool.capacity


def test_a_special_token_outlives_its_budget_and_nothing_else_does() -> None:
    plan = plan_of("\n  all: {admit: all, budget: 4, pinned: {tokens: special}}", prompt=12, max_new_tokens=40)
    assert plan.layers[0].pools[0].bound == 12  # the whole prompt may be special; what is generated never is
    beside, speaker = Beside(plan), Speaker(1)
    special = torch.zeros(1, 12, dtype=torch.bool)
    special[0, [1, 5, 6, 7, 8]] = True
    beside.feed(speaker.numbers(12), special=special)
    assert sorted(set(beside.cache.positions(0).flatten().tolist())) == [-1, 1, 5, 6, 7, 8]
    for step in range(40):
        beside.feed(speaker.numbers(1), special=torch.ones(1, 1, dtype=torch.bool))
        assert sorted(set(beside.cache.positions(1)[0, 0].tolist())) == [-1, 1, 5, 6, 7, 8], step


def test_a_cache_of_several_turns_keeps_what_was_special_in_each() -> None:
    plan = plan_of("\n  all: {admit: all, page: 2, budget: 6, pinned: {tokens: special}}", prompt=20, max_new_tokens=9)
    beside, speaker = Beside(plan), Speaker(1)
    beside.feed(speaker.numbers(10), special=torch.arange(10)[None] == 3)
    speaker.say(beside, 5)
    beside.cache.extend(prompt=20, max_new_tokens=20)
    beside.agreement.plan = beside.cache.plan
    beside.feed(speaker.numbers(10), kind="prompt", special=torch.arange(10)[None] == 0)
    speaker.say(beside, 9)
    assert {2, 3, 15, 16} <= set(beside.cache.positions(0)[0, 1].tolist())


def test_without_flags_there_is_nothing_special() -> None:
    beside, speaker = Beside(plan_of(MARKED, prompt=15, max_new_tokens=20)), Speaker(1)
    beside.feed(speaker.numbers(15))
    speaker.say(beside, 20)
    pools = beside.cache.stats()["pools"]
    assert (pools["marks"]["seen"], pools["images"]["seen"]) == (0, 0)
    assert pools["rest"]["seen"] == 35 * GEOMETRY.layers * GEOMETRY.kv_heads


def test_the_plan_says_what_must_be_told() -> None:
    lengths = {"prompt": 10, "max_new_tokens": 10}
    assert plan_of(MARKED, **lengths).traits == {"special", "image"}
    assert plan_of(PINNED, **lengths).traits == {"special", "image"}
    assert plan_of(TOLD_APART_IN_SOME_LAYERS, **lengths).traits == {"image"}
    assert plan_of("\n  all: {admit: all, pinned: {tokens: special}}", **lengths).traits == frozenset()  # nothing goes
    assert make_plan(load_policy("raas"), GEOMETRY, **lengths).traits == frozenset()


def test_flags_of_another_shape_are_refused() -> None:
    cache = PolicyCache(plan_of(MARKED, batch=2, prompt=10, max_new_tokens=10))
    with pytest.raises(CacheError, match=r"modality says what each token .* shape \(2, 6\), not \(2, 5\)"):
        cache.begin(6, modality=torch.ones(2, 5))
