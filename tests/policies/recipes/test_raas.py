"""RaaS against the recipe of arXiv:2502.11147, version 2."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.pages import Page, bounds, cut
from tests.policies.recipes.plain import Head, Layer, top

BUDGET, PAGE = 72, 4


def raas(layer: Layer) -> Iterator[list[Head]]:
    """The top half of all pages are stamped with the time; the generated page with the oldest stamp goes."""
    yield [Head(set(range(layer.prompt)))] * len(layer.heads)
    prompt = cut(range(layer.prompt), PAGE)
    kept: list[list[Page]] = [[] for _ in layer.heads]
    stamps: list[dict[int, int]] = [{} for _ in layer.heads]
    for step, newest in enumerate(layer.generated, start=1):
        for head, (pages, stamp) in enumerate(zip(kept, stamps, strict=True)):
            if not pages or len(pages[-1]) == PAGE:
                pages.append([])
                stamp[newest] = step
            pages[-1].append(newest)
            everything = prompt + pages
            for used in top(math.ceil(len(everything) / 2), bounds(layer, head, newest, everything)):
                stamp[used] = step
            if len(everything) > BUDGET // PAGE:
                pages.remove(min(pages[:-1], key=lambda page: (stamp[page[0]], page[0])))
        yield [Head({token for page in prompt + pages for token in page}) for pages in kept]


def test_it_keeps_what_the_paper_keeps() -> None:
    check(load_policy("raas", set={"budget": BUDGET, "page_size": PAGE}), raas)
