"""RaaS with a bounded prompt: RaaS's recipe (arXiv:2502.11147) after a prompt cut by SnapKV's window, in pages."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check, text
from tests.policies.recipes.pages import Page, bounds, cut
from tests.policies.recipes.plain import Head, Layer, top

BUDGET, PAGE, WINDOW = 64, 4, 6


def best_pages(layer: Layer, head: int) -> list[Page]:
    """The first page, those that hold the window, and the best of the others, half the budget in all."""
    pages, start = cut(range(layer.prompt), PAGE), layer.prompt - WINDOW
    attention = layer.attention(head, range(start, layer.prompt), range(layer.prompt)).mean(axis=(0, 1))
    safe = {page[0] for page in pages if page[0] == 0 or page[-1] >= start}
    scores = {page[0]: max(attention[page]) for page in pages if page[0] not in safe}
    best = top(BUDGET // PAGE // 2 - len(safe), scores) | safe
    return [page for page in pages if page[0] in best]


def recipe(layer: Layer) -> Iterator[list[Head]]:
    prompts = [best_pages(layer, head) for head in layer.heads]
    yield [Head({token for page in prompt for token in page}) for prompt in prompts]
    kept: list[list[Page]] = [[] for _ in layer.heads]
    stamps: list[dict[int, int]] = [{} for _ in layer.heads]
    for step, newest in enumerate(layer.generated, start=1):
        for head, (prompt, pages, stamp) in enumerate(zip(prompts, kept, stamps, strict=True)):
            if not pages or len(pages[-1]) == PAGE:
                pages.append([])
                stamp[newest] = step
            pages[-1].append(newest)
            for used in top(math.ceil(len(pages) / 2), bounds(layer, head, newest, pages)):
                stamp[used] = step
            if len(prompt) + len(pages) > BUDGET // PAGE:
                pages.remove(min(pages[:-1], key=lambda page: (stamp[page[0]], page[0])))
        yield [
            Head({token for page in prompt + pages for token in page})
            for prompt, pages in zip(prompts, kept, strict=True)
        ]


@pytest.mark.parametrize(("prompt", "steps"), [(70, 200), (22, 60)], ids=["a long prompt", "a short one"])
def test_it_keeps_what_the_two_papers_say(prompt: int, steps: int) -> None:
    params = {"budget": BUDGET, "page_size": PAGE, "window": WINDOW}
    check(load_policy("raas-compressed-prompt", set=params), recipe, text(prompt=prompt, steps=steps))
