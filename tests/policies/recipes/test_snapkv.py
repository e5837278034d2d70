"""SnapKV against section 4 of arXiv:2404.14469."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Head, Layer
from tests.policies.recipes.prompts import snapkv

BUDGET, WINDOW = 24, 8


@pytest.mark.parametrize("kernel", [1, 5])
def test_it_keeps_what_the_paper_keeps(kernel: int) -> None:
    def recipe(layer: Layer) -> Iterator[list[Head]]:
        prompts = [snapkv(layer, head, BUDGET, WINDOW, kernel) for head in layer.heads]
        for now in (layer.prompt, *(newest + 1 for newest in layer.generated)):
            yield [Head(prompt | set(range(layer.prompt, now))) for prompt in prompts]

    check(load_policy("snapkv", set={"budget": BUDGET, "window": WINDOW, "kernel": kernel}), recipe)
