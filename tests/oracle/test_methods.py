"""Published methods, told a second time in a few lines each from their recipes (methods.md), keep the same tokens.

The transcriptions know nothing of pools, pages or the step: each is a loop over time with a list of kept positions.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.oracle.kit import Talk, history, kept

STEPS = 120


def top(count: int, scores: dict[int, float]) -> list[int]:
    """The ``count`` best positions; among equals the newer."""
    return sorted(sorted(scores, key=lambda p: (scores[p], p), reverse=True)[: max(0, count)])


def mean_attention(talk: Talk, query: int, head: int, tokens: list[int]) -> dict[int, float]:
    return dict(zip(tokens, talk.probabilities(query, head, tokens).mean(axis=0), strict=True))


def received(talk: Talk, head: int, tokens: list[int]) -> dict[int, float]:
    """Attention that each token gets from itself and all later ones."""
    sums = dict.fromkeys(tokens, 0.0)
    for query in tokens:
        for position, share in mean_attention(talk, query, head, [p for p in tokens if p <= query]).items():
            sums[position] += share
    return sums


@pytest.mark.parametrize("seed", [1, 2])
def test_streaming_llm(seed: int) -> None:
    talk = Talk(seed, prompt=20, steps=STEPS)
    steps = talk.run("all: {admit: all, budget: 4 + 12, pinned: {first: 4}, window: 12}")
    for step, (resident, _) in zip(steps, history(steps), strict=True):
        now = step.prompt_len + step.t
        assert resident == [*range(4), *range(now - 12, now)]


@pytest.mark.parametrize("seed", [3, 4])
def test_tova(seed: int) -> None:
    talk = Talk(seed, prompt=20, steps=STEPS)
    steps = talk.run("all: {admit: all, budget: 16, scorer: {signal: attention}, evict: {scope: layer}}")
    cache: list[int] = list(range(19))
    for step, residents in zip(steps, history(steps), strict=True):
        newest = step.prompt_len + step.t - 1
        cache.append(newest)
        by_head = [mean_attention(talk, newest, head, cache) for head in range(2)]
        cache = top(16, {p: (by_head[0][p] + by_head[1][p]) / 2 for p in cache})
        assert residents == [cache, cache]


@pytest.mark.parametrize("seed", [5, 6])
def test_h2o(seed: int) -> None:
    talk = Talk(seed, prompt=20, steps=STEPS)
    steps = talk.run("""
        all:
          admit: all
          budget: 16
          window: 6
          scorer: {signal: attention, queries: all, memory: sum}
    """)
    for head in range(2):
        sums = received(talk, head, list(range(20)))
        for step, residents in zip(steps, history(steps), strict=True):
            newest = step.prompt_len + step.t - 1
            if step.kind == "generated":
                sums[newest] = 0.0
                for position, share in mean_attention(talk, newest, head, sorted(sums)).items():
                    sums[position] += share
            recent = [p for p in sums if p > newest - 6]
            heavy = top(16 - 6, {p: s for p, s in sums.items() if p not in recent})
            sums = {p: sums[p] for p in sorted([*heavy, *recent])}
            assert residents[head] == sorted(sums)


SCOPE = """
prompt:
  admit: prompt
  budget: 12
  window: 3
  scorer: {{signal: attention, queries: all, memory: sum}}
  update: prompt-end
generated:
  admit: generated
  budget: {budget}
  window: 8
  scorer: {{signal: attention}}
  update: {{every: {every}}}
"""


@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize("strategy", ["slide", "adaptive", "discontinuous"])
def test_scope(strategy: str, seed: int) -> None:
    """beta1 = 10, beta2 = 8, T = 120, so that one more token is allowed every (T - beta2) // beta1 = 11 steps."""
    talk = Talk(seed, prompt=20, steps=STEPS)
    growing = "8 + clamp((t - 8) * 10 // 112, 0, 10)"
    budget, every = {"slide": ("18", 1), "adaptive": (growing, 1), "discontinuous": (growing, 11)}[strategy]
    steps = talk.run(SCOPE.format(budget=budget, every=every))
    for head in range(2):
        sums = received(talk, head, list(range(20)))
        prompt = sorted([*top(9, {p: sums[p] for p in range(17)}), 17, 18, 19])
        generated: list[int] = []
        for step, residents in zip(steps, history(steps), strict=True):
            t, newest = step.t, step.prompt_len + step.t - 1
            if t:
                generated.append(newest)
                attention = mean_attention(talk, newest, head, prompt + generated)
                history_kept = 10 if strategy == "slide" else min(10, max(0, (t - 8) * 10 // 112))
                if strategy != "discontinuous" or t % 11 == 0:
                    older = {p: attention[p] for p in generated if p <= newest - 8}
                    generated = [*top(history_kept, older), *(p for p in generated if p > newest - 8)]
            assert residents[head] == prompt + generated
    assert len(kept(steps[-1], "generated")) == (18 if strategy != "discontinuous" else 17 + 120 % 11)


@pytest.mark.parametrize("seed", [9, 10])
def test_raas(seed: int) -> None:
    talk = Talk(seed, prompt=18, steps=STEPS)
    steps = talk.run(
        """
        prompt: {admit: prompt, page: page_size}
        generated:
          admit: generated
          page: page_size
          budget: max(2 * page_size, budget - size(prompt))
          scorer: {signal: page-bound, heads: max, hit: {top: touch}, memory: last-hit}
        """,
        """
        params:
          budget: {default: 44, help: tokens kept}
          page_size: {default: 4, help: tokens per page}
          touch: {default: 50%, help: share of pages stamped}
        """,
    )
    for head in range(2):
        prompt = [list(range(at, min(18, at + 4))) for at in range(0, 18, 4)]
        pages: list[list[int]] = []
        stamp: dict[int, int] = {}
        for step, residents in zip(steps, history(steps), strict=True):
            newest = step.prompt_len + step.t - 1
            if step.t:
                if not pages or len(pages[-1]) == 4:
                    pages.append([])
                    stamp[newest] = step.t
                pages[-1].append(newest)
                bounds = {page[0]: raas_bound(talk, newest, head, page) for page in prompt + pages}
                for hit in top(math.ceil(len(bounds) / 2), bounds):
                    stamp[hit] = step.t
                while 4 * (len(prompt) + len(pages)) > 44:
                    pages.remove(min(pages[:-1], key=lambda page: (stamp[page[0]], page[0])))
            assert residents[head] == [position for page in prompt + pages for position in page]


def raas_bound(talk: Talk, query: int, head: int, page: list[int]) -> float:
    """The largest, over the query heads, of the sum over channels of the better end of the page's box."""
    low, high = talk.keys[head][page].min(axis=0), talk.keys[head][page].max(axis=0)
    return max(np.maximum(q * low, q * high).sum() for q in talk.queries[2 * head : 2 * head + 2, query])


SNAPKV = """
prompt:
  admit: prompt
  budget: {budget}
  window: 6
  scorer: {{signal: attention, queries: {{last: 6}}, smooth: {{max: 5}}}}
  update: prompt-end
  evict: {evict}
generated: {{admit: generated}}
"""


def snapkv_scores(talk: Talk, head: int, prompt: int, window: int) -> np.ndarray:
    """Attention of the window's queries on what lies before it, max-pooled over 5."""
    total = np.zeros(prompt - window)
    for query in range(prompt - window, prompt):
        total += talk.probabilities(query, head, range(query + 1)).mean(axis=0)[: prompt - window]
    return np.array([total[max(0, p - 2) : p + 3].max() for p in range(prompt - window)])


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_snapkv(seed: int) -> None:
    talk = Talk(seed, prompt=60, steps=3)
    steps = talk.run(SNAPKV.format(budget=24, evict="{scope: kv-head}"))
    for head in range(2):
        prompt = [*top(18, dict(enumerate(snapkv_scores(talk, head, 60, 6)))), *range(54, 60)]
        assert [residents[head] for residents in history(steps)] == [
            [*prompt, *range(60, 60 + t)] for t in range(4)
        ]  # fmt: skip


@pytest.mark.parametrize("seed", [14, 15])
def test_ada_kv(seed: int) -> None:
    """Both heads' scores compete for 36 places; a head gets round(0.8 x its winners + 0.2 x 18)."""
    talk = Talk(seed, prompt=60, steps=1)
    steps = talk.run(SNAPKV.format(budget=24, evict="{scope: across-heads, floor: 20%}"))
    by_head = [dict(enumerate(snapkv_scores(talk, head, 60, 6))) for head in range(2)]
    ranking = sorted(((s, p, h) for h, scores in enumerate(by_head) for p, s in scores.items()), reverse=True)
    for head in range(2):
        wins = sum(h == head for _, _, h in ranking[:36])
        places = math.floor(0.8 * wins + 0.2 * 18 + 0.5)
        assert history(steps)[0][head] == [*top(places, by_head[head]), *range(54, 60)]


@pytest.mark.parametrize("seed", [16, 17])
def test_r_kv(seed: int) -> None:
    """Budget 20, an observation window of 4, a compression every 16 steps, lambda = 0.1."""
    talk = Talk(seed, prompt=12, steps=STEPS)
    steps = talk.run("""
        all:
          admit: all
          budget: 20
          window: 4
          scorer:
            sum:
              - signal: attention
                queries: {last: 4}
                over: candidates
                heads: {logits: max}
                smooth: {max: 7}
                weight: 0.1
              - {signal: {key-similarity: {above: 0.5, keep: newest}}, norm: softmax, weight: -0.9}
          update: {every: 16}
    """)
    for head in range(2):
        cache = list(range(11))
        for step, residents in zip(steps, history(steps), strict=True):
            newest = step.prompt_len + step.t - 1
            cache.append(newest)
            if step.t % 16 == 0 and len(cache) > 20:
                window, older = cache[-4:], cache[:-4]
                scores = 0.1 * importance(talk, head, window, older) - 0.9 * redundancy(talk, head, cache)[: len(older)]
                cache = [*top(16, dict(zip(older, scores, strict=True))), *window]
            assert residents[head] == cache


def importance(talk: Talk, head: int, window: list[int], older: list[int]) -> np.ndarray:
    rows = []
    for query in window:
        logits = (talk.queries[2 * head : 2 * head + 2, query] @ talk.keys[head][older].T).max(axis=0) / math.sqrt(8)
        rows.append(np.exp(logits) / np.exp(logits).sum())
    mean = np.mean(rows, axis=0)
    return np.array([mean[max(0, p - 3) : p + 4].max() for p in range(len(older))])


def redundancy(talk: Talk, head: int, cache: list[int]) -> np.ndarray:
    """Softmax over the older tokens of the column means of the cosine matrix."""
    keys = talk.keys[head][cache]
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    cosine = keys @ keys.T
    for row in range(len(cache)):
        cosine[row, row] = 0
        alike = [column for column in range(len(cache)) if cosine[row, column] > 0.5]
        if alike:
            cosine[row, max(alike)] = 0
    weights = np.exp(cosine.mean(axis=0))
    return weights / weights[:-4].sum()


@pytest.mark.parametrize("seed", [18, 19])
def test_keydiff(seed: int) -> None:
    talk = Talk(seed, prompt=10, steps=STEPS)
    steps = talk.run("all: {admit: all, budget: 16, window: 1, scorer: {signal: key-anchor, weight: -1}}")
    for head in range(2):
        cache = list(range(9))
        for step, residents in zip(steps, history(steps), strict=True):
            cache.append(step.prompt_len + step.t - 1)
            keys = talk.keys[head] / np.linalg.norm(talk.keys[head], axis=1, keepdims=True)
            anchor = keys[cache].mean(axis=0)
            if len(cache) > 16:
                cache.remove(max(cache[:-1], key=lambda p: keys[p] @ anchor))
            assert residents[head] == cache
