"""StreamingLLM with the original's positions against section 3.2 of arXiv:2309.17453."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvpolicy.language import load_policy
from kvpolicy.oracle import Oracle
from kvpolicy.plan import ModelGeometry, make_plan
from tests.policies.recipes.kit import text
from tests.policies.recipes.plain import Array, Layer, softmax

SINKS, WINDOW = 4, 12


def rotated(vectors: Array, places: Array) -> Array:
    """Rotary embedding: neighbouring halves of the channels turn by an angle that grows with the place."""
    half = vectors.shape[-1] // 2
    angle = np.asarray(places)[:, None] * 100.0 ** (-np.arange(half) / half)
    left, right = vectors[..., :half], vectors[..., half:]
    turned = left * np.cos(angle) - right * np.sin(angle), right * np.cos(angle) + left * np.sin(angle)
    return np.concatenate(turned, axis=-1)


def streaming_llm(layer: Layer, head: int) -> Iterator[tuple[set[int], Array]]:
    """After the prompt and each generated token: the cache, and what the newest query read [G, D].

    Keys are cached as they are, and rotated by their index in the cache whenever they are read.
    """
    cache = list(range(layer.prompt))
    for newest in (layer.prompt - 1, *layer.generated):
        cache += [newest] if newest >= layer.prompt else []
        places = np.arange(len(cache))
        keys = rotated(layer.keys[head][cache], places)
        queries = rotated(layer.group(head)[:, [newest]], places[-1:])[:, 0]
        read = softmax(queries @ keys.T / np.sqrt(keys.shape[1])) @ layer.values[head][cache]
        if len(cache) > SINKS + WINDOW:
            cache = cache[:SINKS] + cache[-WINDOW:]
        yield set(cache), read


def test_keys_are_rotated_to_their_place_in_the_cache() -> None:
    said = text()
    layer = Layer(0, 1, 40, *(rows[0][0].astype(float) for rows in (said.queries, said.keys, said.values)))
    policy = load_policy("streaming-llm-compact", set={"sinks": SINKS, "window": WINDOW})
    plan = make_plan(policy, ModelGeometry("test", 1, 4, 2, 8), prompt=40, max_new_tokens=200)
    oracle = Oracle(plan, rotate=rotated)
    wanted = [list(streaming_llm(layer, head)) for head in layer.heads]
    for t, span in enumerate([slice(0, 40), *(slice(at, at + 1) for at in layer.generated)]):
        given = ([array[:, span]] for array in (layer.queries, layer.keys, layer.values))
        (step,) = oracle.step(0, *given, kind="generated" if t else "prompt")
        for head in layer.heads:
            kept, read = wanted[head][t]
            assert step.heads[head]["all"].kept == kept
            assert step.output is not None
            assert np.abs(step.output[-1, 2 * head : 2 * head + 2] - read).max() < 1e-9
