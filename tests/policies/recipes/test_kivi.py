"""KIVI against section 3 of arXiv:2402.02750: what is read of the old tokens, number by number."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import text, watched
from tests.policies.recipes.plain import Array, Layer, softmax

BITS, GROUP, RESIDUAL = 2, 4, 12


def rounded(numbers: Array) -> Array:
    """A group in 2 bits: whole steps from its least number to its greatest."""
    low, high = numbers.min(), numbers.max()
    step = (high - low) / (2**BITS - 1)
    return low + np.round((numbers - low) / step) * step if step else numbers


def stored(keys: Array, values: Array) -> tuple[Array, Array]:
    """A group of tokens [GROUP, D]: keys channel by channel, values token by token in groups of channels."""
    channels = np.stack([rounded(channel) for channel in keys.T], axis=1)
    tokens = [[rounded(part) for part in np.split(value, value.size // GROUP)] for value in values]
    return channels, np.array([np.concatenate(parts) for parts in tokens])


def kivi(layer: Layer, head: int) -> Iterator[tuple[int, Array]]:
    """After each generated token: how many tokens are old, and the attention [G, D] that it read."""
    keys, values = layer.keys[head].copy(), layer.values[head].copy()
    old = 0
    for newest in (layer.prompt - 1, *layer.generated):
        if newest >= layer.prompt:
            seen = slice(0, newest + 1)
            logits = layer.group(head)[:, newest] @ keys[seen].T / np.sqrt(keys.shape[1])
            yield old, softmax(logits) @ values[seen]
        groups = -(-(newest + 1 - old) // GROUP)
        while groups * GROUP > RESIDUAL:  # the oldest group of the window leaves it
            here = slice(old, old + GROUP)
            keys[here], values[here] = stored(keys[here], values[here])
            old, groups = old + GROUP, groups - 1


def test_what_leaves_the_window_is_read_in_two_bits() -> None:
    said = text(prompt=30)
    layer = Layer(0, 1, 30, *(rows[0][0].astype(float) for rows in (said.queries, said.keys, said.values)))
    wanted = [list(kivi(layer, head)) for head in layer.heads]
    size = len(layer.queries) // len(layer.keys)
    moved = 30 - wanted[0][0][0]
    for seen in watched(load_policy("kivi", set={"bits": BITS, "group": GROUP, "residual": RESIDUAL}), said):
        assert seen.kept() == set(range(seen.newest + 1))
        if seen.step.t:
            old, output = wanted[seen.head][seen.step.t - 1]
            assert seen.step.output is not None
            read = seen.step.output[0, seen.head * size : (seen.head + 1) * size]
            assert np.abs(read - output).max() < 1e-6, f"head {seen.head}, t {seen.step.t}"
            assert seen.attended("recent") >= set(range(old, seen.newest + 1))
    assert moved <= RESIDUAL and wanted[0][-1][0] > 200


def test_fewer_bits_are_worse_and_what_is_in_the_window_is_exact() -> None:
    """How far attention is off that of the full cache, for bits of 2, 4 and 8, and for a window of the whole text."""
    said = text(prompt=30, steps=60)
    layer = Layer(0, 1, 30, *(rows[0][0].astype(float) for rows in (said.queries, said.keys, said.values)))
    exact = layer.attention(0, 89, range(90)) @ layer.values[0]

    def error(**params: int) -> float:
        *_, seen = (at for at in watched(load_policy("kivi", set={"group": GROUP, **params}), said) if at.head == 0)
        assert seen.step.output is not None
        return float(np.abs(seen.step.output[0, :2] - exact).max())

    errors = [error(bits=bits, residual=RESIDUAL) for bits in (2, 4, 8)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0
    assert error(bits=2, residual=400) < 1e-6
