"""How a prompt is cut when it has been read, as the papers have it; several recipes begin so. Nothing of kvpolicy."""

from __future__ import annotations

import numpy as np

from tests.policies.recipes.plain import Array, Layer, smoothed, top


def observed(layer: Layer, head: int, window: int, kernel: int) -> Array:
    """SnapKV's scores of the tokens before the window: attention of the window's queries, the best of neighbours."""
    queries = range(layer.prompt - window, layer.prompt)
    rows = layer.attention(head, queries, range(layer.prompt))[..., : layer.prompt - window]
    return smoothed("max", kernel, rows.sum(axis=1).mean(axis=0))


def snapkv(layer: Layer, head: int, budget: int, window: int, kernel: int) -> set[int]:
    """The best before the window, and the window; a prompt within the budget stays whole."""
    if layer.prompt < budget:
        return set(range(layer.prompt))
    best = top(budget - window, observed(layer, head, window, kernel))
    return best | set(range(layer.prompt - window, layer.prompt))


def pyramid(layer: Layer, budget: int, window: int, beta: float) -> int:
    """PyramidKV's budget of a layer, the window included."""
    mean = budget - window
    if layer.prompt < 2 * mean:
        return budget
    least = mean / beta
    most = 2 * mean - least
    if most >= layer.prompt - window:
        most = layer.prompt - window
        least = 2 * mean - most
    step = (most - least) / (layer.layers - 1)
    return int(np.floor(most - layer.number * step + 1e-9)) + window


def heavy(layer: Layer, head: int, budget: int, window: int) -> set[int]:
    """H2O's: the best by attention summed over all rows, and the newest; a prompt within the budget stays whole."""
    prompt = range(layer.prompt)
    if layer.prompt <= budget:
        return set(prompt)
    received = layer.attention(head, prompt, prompt).sum(axis=1).mean(axis=0)
    return top(budget - window, received[: layer.prompt - window]) | set(range(layer.prompt - window, layer.prompt))
