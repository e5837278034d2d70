"""G-KV against arXiv:2512.00504: R-KV with max-normalised parts, and importance that fades from cut to cut."""

from __future__ import annotations

from collections.abc import Iterator

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check
from tests.policies.recipes.plain import Head, Layer, top
from tests.policies.recipes.test_r_kv import redundancy

BUDGET, BUFFER, WINDOW, FADE, MIX = 24, 8, 4, 0.8, 0.5


def g_kv(layer: Layer) -> Iterator[list[Head]]:
    caches = [list(range(layer.prompt)) for _ in layer.heads]
    global_score: list[dict[int, float]] = [{} for _ in layer.heads]
    for t, newest in enumerate((layer.prompt - 1, *layer.generated)):
        for head, cache in enumerate(caches):
            if t:
                cache.append(newest)
            if t % BUFFER == 0:
                older, window = cache[:-WINDOW], cache[-WINDOW:]
                now = layer.attention(head, window, older).mean(axis=1).max(axis=0)  # over the window, then the group
                before = global_score[head]
                faded = {at: max(FADE * before.get(at, 0.0), f) for at, f in zip(older, now / now.max(), strict=True)}
                alike = redundancy(layer.keys[head][cache])[:-WINDOW]
                alike /= alike.max()
                score = {at: MIX * faded[at] - (1 - MIX) * same for at, same in zip(older, alike, strict=True)}
                global_score[head] = faded
                caches[head] = sorted(top(BUDGET - WINDOW, score)) + window
        yield [Head(set(cache)) for cache in caches]


def test_g_kv_keeps_what_the_paper_keeps() -> None:
    check(load_policy("g-kv", set={"budget": BUDGET, "buffer": BUFFER, "window": WINDOW}), g_kv)
