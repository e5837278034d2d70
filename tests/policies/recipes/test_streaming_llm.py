"""StreamingLLM against section 3.2 of arXiv:2309.17453."""

from __future__ import annotations

from collections.abc import Iterator

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Head, Layer

SINKS, WINDOW = 4, 18


def streaming(layer: Layer) -> Iterator[list[Head]]:
    """The first tokens and the newest."""
    for said in range(layer.prompt, layer.keys.shape[1] + 1):
        yield [Head({*range(SINKS), *range(said - WINDOW, said)})] * len(layer.heads)


def test_it_keeps_what_the_paper_keeps() -> None:
    check(load_policy("streaming-llm", set={"sinks": SINKS, "window": WINDOW}), streaming)
