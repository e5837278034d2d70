"""DuoAttention against arXiv:2410.10819, and FastGen (arXiv:2310.01801) as far as a fixed list goes."""

from __future__ import annotations

from collections.abc import Iterator

from kvpolicy.language import load_policy, loads_policy
from tests.policies.recipes.kit import check, text
from tests.policies.recipes.plain import Head, Layer, top

SINKS, RECENT = 4, 12
LOCAL, FREQUENT = 10, 8


def duo_attention(layer: Layer, retrieval: set[tuple[int, int]] | None = None) -> Iterator[list[Head]]:
    retrieval = {(0, 0), (layer.layers - 1, 0)} if retrieval is None else retrieval
    for newest in (layer.prompt - 1, *layer.generated):
        everything = set(range(newest + 1))
        streaming = {at for at in everything if at < SINKS or at > newest - RECENT}
        yield [Head(everything if (layer.number, head) in retrieval else streaming) for head in layer.heads]


def test_duo_attention_keeps_what_the_paper_keeps() -> None:
    policy = load_policy("duo-attention", set={"sinks": SINKS, "recent": RECENT})
    check(policy, duo_attention, text(layers=3))


def test_a_models_own_list_replaces_the_shipped_one() -> None:
    own = "kvpolicy: 1\nname: own\nextends: duo-attention\noverrides: [{heads: [[1, 1], [2, 0]], dense: true}]\n"
    policy = loads_policy(own, set={"sinks": SINKS, "recent": RECENT})
    check(policy, lambda layer: duo_attention(layer, {(1, 1), (2, 0)}), text(layers=3))


def fastgen(layer: Layer) -> Iterator[list[Head]]:
    """The whole text, a window, or a window and the tokens that got most attention so far, as the list has it."""
    windowed = {(0, 1), (layer.layers - 1, 1)}
    caches = [list(range(layer.prompt)) for _ in layer.heads]
    sums: list[dict[int, float]] = [{} for _ in layer.heads]
    for t, newest in enumerate((layer.prompt - 1, *layer.generated)):
        kept = []
        for head, cache in enumerate(caches):
            if t:
                cache.append(newest)
            queries = [newest] if t else list(range(layer.prompt))
            paid = layer.attention(head, queries, cache).sum(axis=1).mean(axis=0)
            sums[head] = {at: sums[head].get(at, 0.0) + p for at, p in zip(cache, paid, strict=True)}
            local = {at for at in cache if at > newest - LOCAL}
            hitters = top(FREQUENT, {at: sums[head][at] for at in cache if at not in local})
            caches[head] = sorted(local | hitters)
            everything = set(range(newest + 1))
            whole, narrow = (layer.number, head) == (0, 0), (layer.number, head) in windowed
            kept.append(Head(everything if whole else local if narrow else set(caches[head])))
        yield kept


def test_fastgen_keeps_what_each_heads_cache_keeps() -> None:
    check(load_policy("fastgen", set={"local": LOCAL, "frequent": FREQUENT}), fastgen, text(layers=3))
