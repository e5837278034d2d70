"""H2O against algorithm 1 of arXiv:2306.14048."""

from __future__ import annotations

from collections.abc import Iterator

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Head, Layer, top

HEAVY, RECENT = 14, 10


def h2o(layer: Layer) -> Iterator[list[Head]]:
    """Sums of attention, begun with all rows of the prompt; who leaves takes its sum along."""
    prompt = range(layer.prompt)
    sums = [
        dict(zip(prompt, layer.attention(head, prompt, prompt).sum(axis=1).mean(axis=0), strict=True))
        for head in layer.heads
    ]
    for newest in (layer.prompt - 1, *layer.generated):
        for head in layer.heads:
            residents = sums[head]
            if newest >= layer.prompt:
                residents[newest] = 0.0
                attention = layer.attention(head, newest, residents).mean(axis=0)
                residents |= {p: residents[p] + share for p, share in zip(list(residents), attention, strict=True)}
            recent = {position for position in residents if position > newest - RECENT}
            kept = recent | top(HEAVY, {p: total for p, total in residents.items() if p not in recent})
            sums[head] = {position: total for position, total in residents.items() if position in kept}
        yield [Head(set(residents)) for residents in sums]


def test_it_keeps_what_the_paper_keeps() -> None:
    check(load_policy("h2o", set={"heavy": HEAVY, "recent": RECENT}), h2o)
