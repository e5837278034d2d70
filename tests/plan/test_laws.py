"""Memory and time laws: what plans say of them, in words, and what the oracle holds and reads over four lengths."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from kvpolicy.errors import UsageError
from kvpolicy.language import Policy, load_policy, loads_policy
from kvpolicy.plan import ModelGeometry, make_plan
from kvpolicy.plan.laws import Law, laws, laws_by_head, least_shape
from kvpolicy.testing.attention import Attention
from kvpolicy.testing.feeding import OracleAlone, passes
from tests.invariants.policies import ALL, tight

SHAPE = ModelGeometry("random", layers=3, query_heads=2, kv_heads=2, head_dim=4)
LENGTHS = [(16, 16), (64, 16), (16, 64), (64, 64)]
"""(P, N): the two lengths of the prompt and of the answer, each with each."""


def said(policy: Policy, prompt: int, steps: int) -> Attention:
    shape, random = least_shape(policy, SHAPE), np.random.default_rng(prompt + steps)

    def drawn(heads: int) -> tuple[np.ndarray, ...]:
        return (random.normal(size=(shape.layers, heads, prompt + steps, shape.head_dim)).astype(np.float32),)

    return Attention((prompt,), steps, drawn(shape.query_heads), drawn(shape.kv_heads), drawn(shape.kv_heads))


def measured(policy: Policy, prompt: int, steps: int) -> dict[tuple[int, int], tuple[int, int]]:
    """(layer, KV head) -> the most tokens held after the prompt's update, and the most that a generated step read."""
    text = said(policy, prompt, steps)
    plan = make_plan(policy, least_shape(policy, SHAPE), prompt=prompt, max_new_tokens=steps)
    feed, most = OracleAlone(plan), dict[tuple[int, int], tuple[int, int]]()
    for now in passes(text, policy.prompt_chunk and int(policy.prompt_chunk.evaluate({}))):
        for step in feed.feed(text, now):
            for head, pools in enumerate(step.heads):
                generated = now.kind == "generated"
                held = sum(len(pool.kept) + generated * len(pool.evicted) for pool in pools.values())
                read = sum(len(pool.read) for pool in pools.values()) if generated else 0
                before = most.get((step.layer, head), (0, 0))
                most[step.layer, head] = max(before[0], held), max(before[1], read)
    return most


@pytest.mark.parametrize("name", ALL)
def test_what_is_held_and_read_grows_as_the_law_says(name: str) -> None:
    policy = tight(name)
    told = laws_by_head(policy, least_shape(policy, SHAPE))
    found = {}
    for prompt, steps in LENGTHS:
        try:
            found[prompt, steps] = measured(policy, prompt, steps)
        except UsageError:
            assert policy.total is not None and prompt == 64  # refused, and so no exception to the law
    pools = make_plan(policy, SHAPE, prompt=20, max_new_tokens=20).layers[-1].pools
    page, special = max(pool.page for pool in pools), any(pool.pin_special for pool in pools)
    for cell in found[16, 16]:
        part = told.get(cell) or told[cell[0], 0]
        for (prompt, steps), by_cell in found.items():
            held, read = by_cell[cell]
            assert held <= part.memory.at(prompt, steps) + page * len(part.pools), (prompt, steps)
            assert read <= part.time.at(prompt, steps) + page * len(part.pools), (prompt, steps)
        for longer, share in (((64, 16), part.memory.prompt), ((16, 64), part.memory.generated)):
            if longer in found and share and not special:  # no law that is far from what happens
                grown = found[longer][cell][0] - found[16, 16][cell][0]
                assert grown >= share * 48 - part.memory.constant - page


def law_of(pools: str, top: str = "") -> tuple[str, str]:
    (part,) = laws(loads_policy(f"kvpolicy: 1\nname: one\n{top}\npools: {{{pools}}}"))
    return str(part), str(part.time)


@pytest.mark.parametrize(
    ("pools", "memory", "time"),
    [
        ("all: {admit: all}", "O(P + N)", "O(P + N)"),
        ("all: {admit: all, budget: 64}", "O(B)", "O(B)"),
        ("all: {admit: all, budget: 64, update: prompt-end}", "O(N + B)", "O(N + B)"),
        ("all: {admit: all, budget: 35% * prompt_len}", "O(0.35 P)", "O(0.35 P)"),
        ("all: {admit: all, budget: 25% * context + 7}", "O((P + N)/4 + B)", "O((P + N)/4 + B)"),
        ("all: {admit: all, page: 16}", "O(P + N)", "O(P + N)"),
        ("prompt: {admit: prompt}, rest: {admit: generated, budget: 32 + t // 4}", "O(P + N/4 + B)", "O(P + N/4 + B)"),
        ("prompt: {admit: prompt}, rest: {admit: generated, budget: 99, update: {every: 8}}", "O(P + B)", "O(P + B)"),
        ('all: {admit: all, budget: "min(t, prompt_len)"}', "O(min(P, N))", "O(min(P, N))"),
        ("all: {admit: all, page: 8, read: {top: 64, scorer: {signal: page-bound}}}", "O(P + N)", "O((P + N)/8 + B)"),
        ("all: {admit: all, read: {top: 64, scorer: {signal: attention-logit}}}", "O(P + N)", "O(P + N + B)"),
        ("all: {admit: all, read: {top: 64, scorer: {signal: recency}}}", "O(P + N)", "O(B)"),
        ("new: {admit: all, budget: 32, evict: {to: old}}, old: {budget: 64}", "O(B)", "O(B)"),
    ],
)  # fmt: skip
def test_laws_in_words(pools: str, memory: str, time: str) -> None:
    assert law_of(pools) == (memory, time)


def test_a_total_bounds_what_no_pool_does() -> None:
    pools = "prompt: {admit: prompt}, rest: {admit: generated, budget: 'max(4, 64 - size(prompt))'}"
    assert law_of(pools) == ("O(P + B)", "O(P + B)")
    assert law_of(pools, "total: 64") == ("O(B)", "O(B)")


def test_layers_that_differ_are_told_apart() -> None:
    text = "kvpolicy: 1\nname: one\npools: {all: {admit: all, budget: 64}}\noverrides: [{layers: 0..1, dense: true}]"
    most, first = laws(loads_policy(text))
    assert (most.where, str(most), first.where, str(first)) == ("layers 2..31", "O(B)", "layers 0..1", "O(P + N)")


def test_shares_that_move_from_layer_to_layer_are_told_for_all_layers() -> None:
    parts = laws(loads_policy("kvpolicy: 1\nname: one\npools: {all: {admit: all, budget: prompt_len // (layer + 1)}}"))
    assert [part.where for part in parts] == [f"layer {layer}" for layer in range(32)]
    assert [part.memory.prompt for part in parts[:4]] == [1, Fraction(1, 2), Fraction(1, 3), Fraction(1, 4)]


def test_heads_that_differ_are_told_apart() -> None:
    text = "kvpolicy: 1\nname: one\npools: {all: {admit: all, budget: 64}}\noverrides: [{heads: [[3, 0]], dense: true}]"
    most, one = laws(loads_policy(text))
    assert (str(most), one.where, str(one)) == ("O(B)", "1 of 256 KV heads", "O(P + N)")


def test_what_is_stored_in_few_bits_is_told_apart() -> None:
    store = "{bits: 2, group: 16, keys: channel, values: token}"
    pools = f"new: {{admit: all, page: 16, budget: 64, evict: {{to: old}}}}, old: {{page: 16, store: {store}}}"
    assert law_of(pools)[0] == "O(B) + O(P + N) in 2 bits"


def test_a_law_as_numbers() -> None:
    (part,) = laws(load_policy("scope-slide", set={"alpha": 100, "beta1": 20, "beta2": 10}))
    assert part.memory == Law(constant=100 + 30 + 1) and part.memory.bounded
    law = Law(prompt=Fraction(1), generated=Fraction(1, 4), constant=3)
    assert law.at(10, 6) == 10 + 2 + 3 and not law.bounded and str(law) == "O(P + N/4 + B)"
