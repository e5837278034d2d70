"""StreamingLLM with the original's positions against section 3.2 of arXiv:2309.17453."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvpolicy.language import load_policy
from kvpolicy.testing.feeding import RuntimeBeside, plan_for, watch
from tests.policies.recipes.kit import text
from tests.policies.recipes.plain import Array, Layer, softmax

SINKS, WINDOW = 4, 12
FREQUENCIES = (1.0, 0.3, 0.1, 0.03)


def rotated(vectors: Array, places: Array) -> Array:
    """Rotary embedding: the halves of the channels turn against each other, by angles that grow with the place."""
    half = len(FREQUENCIES)
    angle = np.asarray(places)[:, None] * np.array(FREQUENCIES)
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
    """In the runtime, too: it is given keys that were rotated at their positions, and compared at every pass."""
    said = text()
    layer = Layer(0, 1, 40, *(rows[0][0].astype(float) for rows in (said.queries, said.keys, said.values)))
    plan = plan_for(load_policy("streaming-llm-compact", set={"sinks": SINKS, "window": WINDOW}), said)
    wanted = [list(streaming_llm(layer, head)) for head in layer.heads]
    for seen in watch(RuntimeBeside(plan, frequencies=FREQUENCIES), said):
        kept, read = wanted[seen.head][seen.step.t]
        assert seen.kept() == kept
        assert seen.step.output is not None
        assert np.abs(seen.step.output[-1, 2 * seen.head : 2 * seen.head + 2] - read).max() < 1e-5
