"""RaaS with a second, cold pool (arXiv:2502.11147, section 3; a recipe of this project): who moves, and who leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import text, watched
from tests.policies.recipes.pages import bound
from tests.policies.recipes.plain import Layer, top

PROMPT, BUDGET, COLD, PAGE, TOUCH = 8, 24, 16, 2, 0.5


@dataclass
class Timed:
    """Tokens of a page and when it was last among the best."""

    tokens: list[int]
    stamp: int


def touch(layer: Layer, head: int, query: int, pages: list[Timed], t: int) -> None:
    best = top(
        math.ceil(TOUCH * len(pages)), [bound(layer, head, query, page.tokens) for page in pages], range(len(pages))
    )
    for number in best:
        pages[number].stamp = t


def drop(pages: list[Timed], most: int) -> list[Timed]:
    """The pages least recently among the best; the newest is safe."""
    gone = sorted(pages[:-1], key=lambda page: (page.stamp, page.tokens[0]))[: max(0, len(pages) - most)]
    pages[:] = [page for page in pages if page not in gone]
    return sorted(gone, key=lambda page: page.tokens[0])


def raas_int4(layer: Layer, head: int) -> Iterator[tuple[set[int], set[int]]]:
    """What is hot and what is cold after each generated token."""
    hot: list[Timed] = []
    cold: list[Timed] = []
    for t, newest in enumerate(layer.generated, start=1):
        if not hot or len(hot[-1].tokens) == PAGE:
            hot.append(Timed([], t))
        hot[-1].tokens.append(newest)
        for pages in (hot, cold):
            touch(layer, head, newest, pages, t)
        for page in drop(hot, (BUDGET - PROMPT) // PAGE):
            cold.append(Timed(page.tokens, t))
        drop(cold, COLD // PAGE)
        yield tuple({token for page in pages for token in page.tokens} for pages in (hot, cold))


def test_pages_cool_down_before_they_leave() -> None:
    said = text(prompt=PROMPT)
    layer = Layer(0, 1, PROMPT, *(rows[0][0].astype(float) for rows in (said.queries, said.keys, said.values)))
    wanted = [list(raas_int4(layer, head)) for head in layer.heads]
    left = 0
    for seen in watched(load_policy("raas-int4", set={"budget": BUDGET, "cold": COLD, "page_size": PAGE}), said):
        if seen.step.t:
            found = seen.kept("generated"), seen.kept("cold")
            assert found == wanted[seen.head][seen.step.t - 1], f"head {seen.head}, t {seen.step.t}"
            left += len(seen.step.heads[seen.head]["cold"].evicted)
        assert seen.kept("prompt") == set(range(PROMPT))
    assert left
