"""Pictures in text: how a layer's slots lie, and bars of one scale. Marks differ by shape, so no colour is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from kvpolicy.plan import LayerPlan, PoolPlan
from kvpolicy.plan.timeline import PoolTimeline

Pick = Callable[[Sequence[int]], int]

WIDTH = 60
KEPT, SAFE, RANKED, FREE = "█▓▒·"
LEGEND = (
    (KEPT, "never evicted"),
    (SAFE, "safe while it is new"),
    (RANKED, "ranked, the lowest goes"),
    (FREE, "free until the next update"),
)


def slots(layer: LayerPlan, lines: Sequence[PoolTimeline]) -> Iterator[str]:
    """A line per pool, each beginning where the one before ends, and a legend of the marks that occur."""
    width = max(len(pool.name) for pool in layer.pools)
    seen, start = "", 0
    for pool, line in zip(layer.pools, lines, strict=True):
        parts = [(mark, tokens) for mark, tokens in _parts(pool, line) if tokens]
        bar = fill(parts, max(1, round(WIDTH * pool.capacity / layer.slots)))
        seen += bar
        room = " " * min(start, WIDTH - 1)
        said = " + ".join(f"{tokens:,} {mark}" for mark, tokens in parts)
        yield f"{pool.name:<{width}}  {room}{bar}  {said}"
        start += len(bar)
    yield f"{'':<{width}}  {'   '.join(f'{mark} {meaning}' for mark, meaning in LEGEND if mark in seen)}"


def _parts(pool: PoolPlan, line: PoolTimeline) -> Iterator[tuple[str, int]]:
    """The slots of a full pool by what protects what is in them, in tokens."""
    if not pool.evicts:
        yield KEPT, pool.capacity
        return
    first = min(pool.bound, -(-line.first // pool.page) * pool.page)
    newest = max(line.window, pool.page if pool.page > 1 else 0)
    window = min(pool.bound - first, -(-newest // pool.page) * pool.page)
    yield KEPT, first
    yield RANKED, pool.bound - first - window
    yield SAFE, window
    yield FREE, pool.capacity - pool.bound


def fill(parts: Sequence[tuple[str, int]], width: int) -> str:
    """A bar of about `width` cells; every part gets one at least."""
    total = sum(tokens for _, tokens in parts)
    cells = {mark: max(1, round(width * tokens / total)) for mark, tokens in parts}
    largest = max(cells, key=lambda mark: cells[mark])
    cells[largest] = max(1, cells[largest] + width - sum(cells.values()))
    return "".join(mark * count for mark, count in cells.items())


def bar(value: int, most: int, width: int = 40) -> str:
    """A plain bar: `value` of `most`."""
    return KEPT * max(1, round(width * value / max(1, most)))


def strip(values: Sequence[int], cells: int = 40, *, most: int | None = None, of: Pick = max) -> str:
    """A sparkline from 0 to `most` (the largest value unless given); a cell stands for the largest of its stretch, or
    for another that `of` picks.
    """
    marks = "▁▂▃▄▅▆▇█"
    cells, most = min(cells, len(values)), most or max(values, default=0) or 1
    edges = [len(values) * cell // cells for cell in range(cells + 1)] if cells else [0]
    stretches = [values[begin:end] for begin, end in pairwise(edges)]
    return "".join(marks[-(-7 * of(stretch) // most)] for stretch in stretches)
