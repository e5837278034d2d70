"""Policies that must be one and the same, on random text."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from kvpolicy.oracle import Oracle
from tests.oracle.kit import Talk, history, kept, plan_of, scores

STEPS = 120
History = list[list[list[int]]]
SCOPE = """
prompt: {{admit: prompt{prompt}}}
generated:
  admit: generated
  budget: {budget}
  window: {beta2}
  scorer: {{signal: attention}}
  update: {{every: "{every}"}}
"""
CUT = ", budget: 12, window: 3, scorer: {signal: attention, queries: all, memory: sum}, update: prompt-end"
GROWING = "beta2 + clamp((t - beta2) * beta1 // max(1, horizon - beta2), 0, beta1)"


def scope(
    talk: Talk, budget: str = GROWING, every: str = "1", prompt: str = CUT, **params: int
) -> list[list[list[int]]]:
    values = {"beta1": 10, "beta2": 8, "horizon": STEPS} | params
    used = [name for name in values if name in budget + every + "beta2"]
    top = "params:\n" + "\n".join(f"  {name}: {{default: {values[name]}, help: a number}}" for name in used)
    return history(talk.run(SCOPE.format(prompt=prompt, budget=budget, every=every, beta2="beta2"), top))


@pytest.mark.parametrize("seed", [1, 2])
def test_discontinuous_with_interval_one_is_adaptive(seed: int) -> None:
    talk = Talk(seed, prompt=20, steps=STEPS)
    interval = "max(1, (horizon - beta2) // beta1)"
    assert scope(talk, every=interval, beta1=112) == scope(talk, beta1=112)
    assert scope(talk, every=interval) != scope(talk)


def test_adaptive_without_heavy_hitters_keeps_what_is_recent() -> None:
    talk = Talk(3, prompt=20, steps=STEPS)
    recent = "prompt: {admit: prompt%s}\ngenerated: {admit: generated, budget: 8}" % CUT  # noqa: UP031
    assert scope(talk, beta1=0) == history(talk.run(recent))


def test_the_adaptive_budget_ends_at_beta1_plus_beta2() -> None:
    talk = Talk(4, prompt=20, steps=STEPS)
    sizes = [len(heads[0]) - 12 for heads in scope(talk)]
    assert sizes[:9] == list(range(9)) and sizes[STEPS] == 18
    assert all(after - before in (0, 1) for before, after in pairwise(sizes))
    assert sizes[8:] == [8 + (t - 8) * 10 // 112 for t in range(8, STEPS + 1)]


@pytest.mark.parametrize("seed", [5, 6])
def test_h2o_without_memory_and_with_the_prompt_pinned_is_slide(seed: int) -> None:
    talk = Talk(seed, prompt=20, steps=STEPS)
    h2o = "all: {admit: all, budget: 20 + 18, pinned: {first: 20}, window: 8, scorer: {signal: attention}}"
    assert history(talk.run(h2o)) == scope(talk, budget="18", prompt="")


@pytest.mark.parametrize("seed", [7, 8])
def test_slide_keeps_the_top_of_every_step(seed: int) -> None:
    """Dropping one token a step is the same as keeping the top beta1 of what is there."""
    talk = Talk(seed, prompt=20, steps=STEPS)
    steps = talk.run(SCOPE.format(prompt="", budget=18, beta2=8, every=1))
    for before, step in pairwise(steps):
        held = sorted(before.heads[0]["generated"].kept | {step.prompt_len + step.t - 1})
        if len(held) > 18:
            attention = dict(zip(step.attended[0], step.probabilities[0][:, 0].mean(axis=0), strict=True))
            ranked = sorted(held[:-8], key=lambda p: attention[p])
            assert kept(step, "generated") == sorted(ranked[-10:]) + held[-8:]


RAAS = """
prompt: {{admit: prompt, page: 4}}
generated:
  admit: generated
  page: 4
  budget: max(8, {budget} - size(prompt))
  scorer: {{signal: page-bound, heads: max, hit: {{top: {touch}}}, memory: last-hit}}
"""


def test_raas_that_touches_nothing_is_first_in_first_out() -> None:
    talk = Talk(9, prompt=18, steps=STEPS)
    fifo = "prompt: {admit: prompt, page: 4}\ngenerated: {admit: generated, page: 4, budget: 44 - size(prompt)}"
    assert history(talk.run(RAAS.format(budget=44, touch=0))) == history(talk.run(fifo))


def test_raas_that_touches_everything_is_first_in_first_out() -> None:
    talk = Talk(9, prompt=18, steps=STEPS)
    assert history(talk.run(RAAS.format(budget=44, touch=1))) == history(talk.run(RAAS.format(budget=44, touch=0)))


def pyramid(beta: int) -> str:
    """SnapKV's prompt pool with PyramidKV's budget: c = 18 history tokens, beta, window 6."""
    least = f"18 / {beta}"
    return f"""
        prompt:
          admit: prompt
          budget: round(36 - {least} - layer * (36 - 2 * {least}) / max(1, layers - 1)) + 6
          window: 6
          scorer: {{signal: attention, queries: {{last: 6}}, smooth: {{max: 5}}}}
          update: prompt-end
        generated: {{admit: generated}}
    """


def snapkv(evict: str = "{scope: kv-head}") -> str:
    return f"""
        prompt:
          admit: prompt
          budget: 24
          window: 6
          scorer: {{signal: attention, queries: {{last: 6}}, smooth: {{max: 5}}}}
          update: prompt-end
          evict: {evict}
        generated: {{admit: generated}}
    """


def by_layer(talk: Talk, pools: str, layers: int) -> list[list[list[int]]]:
    oracle = Oracle(plan_of(pools, layers=layers, prompt=talk.prompt, new=talk.steps, **talk.shape))
    arrays = [[array[:, : talk.prompt]] for array in (talk.queries, talk.keys, talk.values)]
    return history([oracle.step(layer, *arrays)[0] for layer in range(layers)])


def test_pyramidkv_with_beta_one_is_snapkv() -> None:
    talk = Talk(10, prompt=60, steps=1)
    assert by_layer(talk, pyramid(beta=1), layers=3) == by_layer(talk, snapkv(), layers=3)
    assert [len(heads[0]) for heads in by_layer(talk, pyramid(beta=9), layers=3)] == [40, 24, 8]


@pytest.mark.parametrize("seed", [11, 12])
def test_ada_kv_with_a_whole_floor_is_snapkv(seed: int) -> None:
    talk = Talk(seed, prompt=60, steps=5)
    assert history(talk.run(snapkv("{scope: across-heads, floor: 100%}"))) == history(talk.run(snapkv()))
    assert history(talk.run(snapkv("{scope: across-heads}"))) != history(talk.run(snapkv()))


def rope(vectors: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotary embedding over D / 2 pairs of channels."""
    half = vectors.shape[-1] // 2
    angles = np.asarray(positions)[:, None] / 100.0 ** (np.arange(half) / half)
    a, b = vectors[..., :half], vectors[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)


def test_streaming_llm_is_the_same_compact_or_absolute_until_it_evicts() -> None:
    talk = Talk(13, prompt=10, steps=30)
    pools = "all: {admit: all, budget: 20, pinned: {first: 4}, window: 16}"
    compact = Oracle(plan_of(pools, "positions: compact", **talk.shape), rotate=rope)
    absolute = Oracle(plan_of(pools, **talk.shape))
    same = []
    for part in talk.passes():
        places, value = np.arange(part.start, part.stop), [talk.values[:, part]]
        query, key = talk.queries[:, part], talk.keys[:, part]
        one = compact.step(0, [query], [key], value)[0]
        other = absolute.step(0, [rope(query, places)], [rope(key, places)], value)[0]
        assert history([one]) == history([other])
        same.append(np.allclose(one.output, other.output))
    assert same == [True] * 12 + [False] * 19  # the first to go, at t = 11, was still seen then


@pytest.mark.parametrize(
    "pools",
    [
        "all: {admit: all, budget: 150, scorer: {signal: attention, memory: sum}}",
        "all: {admit: all, budget: 150, page: 8, scorer: {signal: page-bound, hit: {top: 50%}, memory: last-hit}}",
        "all: {admit: all, budget: 150, evict: {scope: layer}, scorer: {signal: key-norm}}",
        "all: {admit: all, page: 8, read: {top: 150, scorer: {signal: page-bound}}}",
        "recent: {admit: all, budget: 30, evict: {to: old}}\nold: {budget: 130}",
        RAAS.format(budget=150, touch="50%"),
        SCOPE.format(prompt=CUT.replace("12", "20"), budget=130, beta2=8, every=7),
    ],
)
def test_a_budget_of_the_whole_length_is_full_attention(pools: str) -> None:
    talk = Talk(14, prompt=20, steps=STEPS)
    for step, dense in zip(talk.run(pools), talk.run("all: {admit: all}"), strict=True):
        assert history([step]) == history([dense])
        np.testing.assert_allclose(step.output, dense.output, rtol=1e-12, atol=1e-12)


def test_attention_of_the_full_cache_is_attention() -> None:
    talk = Talk(15, prompt=6, steps=2)
    first, *_, last = talk.run("all: {admit: all}")
    for head in range(2):
        expected = talk.probabilities(7, head, range(8)) @ talk.values[head][:8]
        np.testing.assert_allclose(last.output[0, 2 * head : 2 * head + 2], expected)
        expected = talk.probabilities(2, head, range(3)) @ talk.values[head][:3]
        np.testing.assert_allclose(first.output[2, 2 * head : 2 * head + 2], expected)


def test_logits_given_are_as_good_as_queries_and_keys() -> None:
    talk = Talk(16, prompt=12, steps=40)
    scorer = "{signal: attention, queries: {last: 3}, memory: {decay: 0.9}}"
    pools = f"all: {{admit: all, budget: 10, window: 2, scorer: {scorer}}}"
    told = Oracle(plan_of(pools, **talk.shape))
    logits = np.repeat(talk.keys, 2, axis=0) @ talk.queries.swapaxes(1, 2) / np.sqrt(8)
    for part, step in zip(talk.passes(), talk.run(pools), strict=True):
        shown = told.step(0, None, None, logits=[logits.swapaxes(1, 2)[:, part, : part.stop]])[0]
        assert history([shown]) == history([step])
        assert scores(shown, "all") == pytest.approx(scores(step, "all"), abs=1e-8)


def test_one_head_is_a_layer() -> None:
    talk = Talk(17, prompt=12, steps=60, query_heads=3, kv_heads=1)
    pools = "all: {{admit: all, budget: 10, scorer: {{signal: attention, memory: sum}}, evict: {{scope: {scope}}}}}"
    own, layer, across = (history(talk.run(pools.format(scope=s))) for s in ("kv-head", "layer", "across-heads"))
    assert own == layer == across
