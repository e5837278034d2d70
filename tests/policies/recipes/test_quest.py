"""Quest against section 3 of arXiv:2406.10774, on the layers after the first two."""

from __future__ import annotations

from collections.abc import Iterator

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check, text
from tests.policies.recipes.pages import bounds, cut
from tests.policies.recipes.plain import Head, Layer, top

BUDGET, PAGE = 24, 4


def quest(layer: Layer) -> Iterator[list[Head]]:
    """The newest page, and of the others the best that the budget has room for; in the first two layers, all."""
    yield [Head(set(range(layer.prompt)))] * len(layer.heads)
    for newest in layer.generated:
        pages, heads = cut(range(newest + 1), PAGE), []
        for head in layer.heads:
            best = top(BUDGET // PAGE - 1, bounds(layer, head, newest, pages[:-1]))
            read = {token for page in pages if page[0] in best or page is pages[-1] for token in page}
            heads.append(Head(set(range(newest + 1)), read if layer.number >= 2 else set(range(newest + 1))))
        yield heads


def test_it_reads_what_the_paper_reads_and_keeps_everything() -> None:
    check(load_policy("quest", set={"budget": BUDGET, "page_size": PAGE}), quest, text(layers=3, prompt=42))
