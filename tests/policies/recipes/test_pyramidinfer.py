"""PyramidInfer's KV part (arXiv:2405.12532) as its code has it, with the shares of layers that the policy states."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check, text
from tests.policies.recipes.plain import Array, Head, Layer, top

SINKS, ROWS, CHUNK, LEAST, THINNING = 4, 8, 32, 0.2, 0.5


def fall(layer: int, layers: int) -> float:
    """The paper's cosine, from 1 in the first layer towards 0."""
    return (math.cos(math.pi * layer / layers) + 1) / 2


def agreed(layer: Layer, newest: int, residents: list[int]) -> Array:
    """Attention of the newest rows, averaged over them and over all heads of the layer."""
    rows = range(newest - ROWS + 1, newest + 1)
    return np.mean([layer.attention(head, rows, residents).mean(axis=(0, 1)) for head in layer.heads], axis=0)


def pyramidinfer(layer: Layer) -> Iterator[list[Head]]:
    """One set for all heads: the prompt is cut once, its ends kept; each chunk once it is no longer recent."""
    down = fall(layer.number, layer.layers)
    tail = int(0.2 * layer.prompt)
    context = layer.prompt - tail
    scores = agreed(layer, layer.prompt - 1, list(range(layer.prompt)))[:context]
    scores[:SINKS] = np.inf
    chosen = top(max(SINKS, int((LEAST + (1 - LEAST) * down) * context)), scores)
    prompt = sorted(chosen) + list(range(context, layer.prompt))
    thinned: list[int] = []
    recent: list[int] = []
    moved = 0
    yield [Head(set(prompt))] * len(layer.heads)
    for t, newest in enumerate(layer.generated, start=1):
        recent.append(newest)
        if t % CHUNK == 0:
            residents = prompt + thinned + recent
            scored = dict(zip(residents, agreed(layer, newest, residents), strict=True))
            chunk, recent = recent[:-ROWS], recent[-ROWS:]
            moved += len(chunk)
            share = int(THINNING * (0.9 + 0.1 * down) * moved) - len(thinned)
            thinned += sorted(top(share, {token: scored[token] for token in chunk}))
        yield [Head({*prompt, *thinned, *recent})] * len(layer.heads)


def test_it_keeps_what_the_paper_keeps() -> None:
    params = {"sinks": SINKS, "rows": ROWS, "chunk": CHUNK, "thinning": str(THINNING)}
    check(load_policy("pyramidinfer", set=params), pyramidinfer, text(layers=2))


def test_the_share_of_a_layer_stays_near_the_product_over_the_layers_below() -> None:
    """In the code, a layer keeps 0.9 + 0.1 * fall of what the layer before has left over; in 32 layers:"""
    product = np.cumprod([0.9 + 0.1 * fall(layer, 32) for layer in range(32)])
    policy = load_policy("pyramidinfer", set={"sinks": 0, "tail": 0})
    budget = policy.pools["prompt"].budget
    assert budget is not None
    shares = [float(budget.evaluate({"layer": n, "layers": 32, "prompt_len": 10000})) / 10000 for n in range(32)]
    assert shares[0] == product[0] == 1
    assert all(-0.01 < kept - share < 0.13 for kept, share in zip(product, shares, strict=True))
