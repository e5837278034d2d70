"""Quest on the prompt and RaaS on what is generated, against arXiv:2406.10774 and arXiv:2502.11147."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check, text
from tests.policies.recipes.pages import Page, bounds, cut
from tests.policies.recipes.plain import Head, Layer, top

BUDGET, READ, PAGE = 48, 16, 4


def quest_raas(layer: Layer) -> Iterator[list[Head]]:
    """The budget is what is read of the prompt, or all of it if that is less, and what is kept of the rest."""
    yield [Head(set(range(layer.prompt)))] * len(layer.heads)
    prompt = cut(range(layer.prompt), PAGE)
    room = BUDGET // PAGE - min(READ // PAGE, len(prompt))
    kept: list[list[Page]] = [[] for _ in layer.heads]
    stamps: list[dict[int, int]] = [{} for _ in layer.heads]
    for step, newest in enumerate(layer.generated, start=1):
        heads = []
        for head, (pages, stamp) in enumerate(zip(kept, stamps, strict=True)):
            if not pages or len(pages[-1]) == PAGE:
                pages.append([])
                stamp[newest] = step
            pages[-1].append(newest)
            best = top(READ // PAGE - 1, bounds(layer, head, newest, prompt[:-1])) | {prompt[-1][0]}
            read = {token for page in [*pages, *(page for page in prompt if page[0] in best)] for token in page}
            for used in top(math.ceil(len(pages) / 2), bounds(layer, head, newest, pages)):
                stamp[used] = step
            if len(pages) > room:
                pages.remove(min(pages[:-1], key=lambda page: (stamp[page[0]], page[0])))
            heads.append(Head(set(range(layer.prompt)) | {token for page in pages for token in page}, read))
        yield heads


@pytest.mark.parametrize("prompt", [39, 10], ids=["a long prompt", "a short one"])
def test_it_keeps_and_reads_what_the_two_papers_say(prompt: int) -> None:
    params = {"budget": BUDGET, "prompt_read": READ, "page_size": PAGE}
    check(load_policy("quest-raas", set=params), quest_raas, text(prompt=prompt, steps=200))
