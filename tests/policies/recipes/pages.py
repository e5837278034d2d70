"""Pages of tokens, and Quest's bound on what a query can want of them (section 3 of arXiv:2406.10774). No kvpolicy."""

from __future__ import annotations

import numpy as np

from tests.policies.recipes.plain import Layer

Page = list[int]


def cut(tokens: range, size: int) -> list[Page]:
    """So many tokens a page, the last page maybe shorter."""
    return [list(tokens[at : at + size]) for at in range(0, len(tokens), size)]


def bound(layer: Layer, head: int, query: int, page: Page) -> float:
    """Each channel of the query times whichever end of the page's box it likes better; the keenest query head's."""
    keys = layer.keys[head][page]
    low, high = keys.min(axis=0), keys.max(axis=0)
    return max(float(np.maximum(q[query] * low, q[query] * high).sum()) for q in layer.group(head))


def bounds(layer: Layer, head: int, query: int, pages: list[Page]) -> dict[int, float]:
    """First token of each page -> its bound."""
    return {page[0]: bound(layer, head, query, page) for page in pages}
