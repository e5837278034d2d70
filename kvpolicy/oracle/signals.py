"""The signals, from queries and keys to one number per unit of a KV head. Higher is better.

A token signal is a function (view, leaf, over, ranked) -> [G, queries, tokens], or [tokens] where queries play no part:
``over`` [tokens] bool is the softmax's domain, ``ranked`` [tokens] bool are the tokens of the units to be scored. A
unit signal is a function (view, leaf, pages) -> [G, queries, pages] or [pages]. What has queries and heads is then
reduced over them, and the tokens of a page to their maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from kvpolicy.errors import UsageError
from kvpolicy.language.signals import definition, origin, recipe
from kvpolicy.oracle.blocks import lag, lag_margins
from kvpolicy.oracle.text import Array, Page, View
from kvpolicy.plan import ScorerPlan

TokenSignal = Callable[[View, ScorerPlan, Array, Array], Array]
UnitSignal = Callable[[View, ScorerPlan, Sequence[Page]], Array]


def softmax(logits: Array, sinks: Array | None = None) -> Array:
    """Over the last axis, beside sinks that take their share; all zeros where a query sees nothing."""
    top = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    top = top if sinks is None else np.maximum(top, sinks)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True) + (0.0 if sinks is None else np.exp(sinks - top))
    return weights / np.where(total == 0, 1.0, total)


def attention(view: View, leaf: ScorerPlan, over: Array, ranked: Array) -> Array:
    """Probabilities of each query over the tokens it may see: over all of the cache, as attention itself has them."""
    whole = leaf.over == "cache" and leaf.heads != "logits-max"
    return softmax(np.where(over, _logits(view, leaf), -np.inf), view.sinks() if whole else None)


def _logits(view: View, leaf: ScorerPlan) -> Array:
    """[G, queries, tokens]; one head is left where the maximum over heads goes before the softmax."""
    logits = view.logits(view.asked(leaf.queries))
    return logits.max(axis=0, keepdims=True) if leaf.heads == "logits-max" else logits


def gumbel_attention(view: View, leaf: ScorerPlan, over: Array, ranked: Array) -> Array:
    """Keyformer: noise on the logits, and a temperature that rises with t (methods.md 5.7)."""
    args = dict(leaf.args)
    noise = np.array([gumbel(int(args["seed"]), view.layer, view.head, int(at)) for at in view.tokens])
    temperature = float(args["temperature"]) + float(args["growth"]) * view.t
    return softmax(np.where(over, (_logits(view, leaf) + noise) / temperature, -np.inf))


def above_average(view: View, leaf: ScorerPlan, over: Array, ranked: Array) -> Array:
    """Scissorhands: whether a token gets its share of a query's attention, or more (methods.md 5.7)."""
    return (shares(view, leaf, over, ranked) >= SHARE).astype(float)


def shares(view: View, leaf: ScorerPlan, over: Array, ranked: Array) -> Array:
    """Probabilities times the number of tokens that the query sees."""
    seen = over & (view.tokens <= view.asked(leaf.queries)[:, None])
    return softmax(np.where(over, _logits(view, leaf), -np.inf)) * seen.sum(axis=-1, keepdims=True)


SHARE = 1 - 2**-12
"""What counts as a whole share: where all get the same, rounding is not to decide who does."""


def attention_logit(view: View, leaf: ScorerPlan, over: Array, ranked: Array) -> Array:
    logits = view.logits(view.asked(leaf.queries))
    return np.where(np.isfinite(logits), logits, 0.0)


def key_norm(view: View, leaf: ScorerPlan, over: Array, ranked: Array) -> Array:
    return np.linalg.norm(view.keys(), axis=-1)


def value_norm(view: View, leaf: ScorerPlan, over: Array, ranked: Array) -> Array:
    return np.linalg.norm(view.values(), axis=-1)


def key_anchor(view: View, leaf: ScorerPlan, over: Array, ranked: Array) -> Array:
    """KeyDiff: cosine with the mean direction of the pool's keys (methods.md 5.5)."""
    keys = _unit_length(view.keys())
    return keys @ _unit_length(keys[ranked].mean(axis=0))


def key_similarity(view: View, leaf: ScorerPlan, over: Array, ranked: Array) -> Array:
    """R-KV's redundancy: how much a token resembles the others on average (methods.md 5.1)."""
    above = float(dict(leaf.args)["above"])
    keys = _unit_length(view.keys()[ranked])
    cosines = keys @ keys.T
    np.fill_diagonal(cosines, 0.0)
    for row in cosines:
        alike = np.flatnonzero(row > above)
        if len(alike):  # the newest copy is the one to keep
            row[alike[-1]] = 0.0
    redundancy = np.zeros(len(view.tokens))
    redundancy[ranked] = cosines.mean(axis=0)
    return redundancy


def page_bound(view: View, leaf: ScorerPlan, pages: Sequence[Page]) -> Array:
    """Quest's upper bound on a page's logits from the box of its keys (methods.md 4.3), scaled."""
    queries = view.asked(leaf.queries)
    columns, starts = view.columns(pages)
    if view.text.queries is None:  # no box of keys to look into: the page's best logit is the tightest bound
        bounds = np.maximum.reduceat(view.logits(queries)[:, :, columns], starts, axis=-1)
    else:
        keys, vectors = view.keys()[columns], view.vectors(queries)
        high, low = np.maximum.reduceat(keys, starts, axis=0), np.minimum.reduceat(keys, starts, axis=0)
        bounds = np.maximum(vectors, 0) @ high.T + np.minimum(vectors, 0) @ low.T
        bounds = view.capped(bounds * view.text.scaling)
    return np.where(np.array([page.position for page in pages]) <= queries[:, None], bounds, 0.0)


def recency(view: View, leaf: ScorerPlan, pages: Sequence[Page]) -> Array:
    return np.array([max(page.positions) for page in pages], dtype=float)


def random(view: View, leaf: ScorerPlan, pages: Sequence[Page]) -> Array:
    seed = int(dict(leaf.args).get("seed", 0))
    return np.array([draw(seed, view.layer, view.head, page.position) for page in pages])


def draw(*numbers: int) -> float:
    """A number in [0, 1) out of integers."""
    return drawn(*numbers) / 2**24


@cache
def gumbel(*numbers: int) -> float:
    """A Gumbel number out of integers: of the 24 bits the last is set, so that neither logarithm is of 0."""
    return -math.log(-math.log1p(-(drawn(*numbers) | 1) / 2**24))


def drawn(*numbers: int) -> int:
    """24 bits: the upper ones of splitmix64's finaliser chained over the numbers."""
    mask, state = 2**64 - 1, 0
    for number in numbers:
        state ^= (number + 0x9E3779B97F4A7C15) & mask
        state ^= state >> 30
        state = state * 0xBF58476D1CE4E5B9 & mask
        state ^= state >> 27
        state = state * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 40


TOKEN_SIGNALS: dict[str, TokenSignal] = {
    "attention": attention,
    "gumbel-attention": gumbel_attention,
    "above-average": above_average,
    "attention-logit": attention_logit,
    "key-norm": key_norm,
    "value-norm": value_norm,
    "key-anchor": key_anchor,
    "key-similarity": key_similarity,
    "lag": lag,
}
MARGINS: dict[str, TokenSignal] = {"above-average": shares, "lag": lag_margins}
"""Of signals that decide something themselves: how close to the bar a token came, or to another; 1 is on the spot."""
UNIT_SIGNALS: dict[str, UnitSignal] = {"page-bound": page_bound, "recency": recency, "random": random}


def signal(
    view: View, leaf: ScorerPlan, pages: Sequence[Page], own: Sequence[Page], candidates: Sequence[Page]
) -> Array:
    """One number per page: signal, then queries, heads, and the maximum over a page's tokens.

    ``own`` are the pages of the scorer's pool, ``candidates`` its unprotected ones.
    """
    if leaf.signal in UNIT_SIGNALS or (leaf.signal not in TOKEN_SIGNALS and definition(leaf.signal).units):
        of_units = UNIT_SIGNALS.get(leaf.signal) or plugged_in(leaf.signal)
        return _over_heads(leaf, _over_queries(leaf, of_units(view, leaf, pages)))
    of_tokens = TOKEN_SIGNALS.get(leaf.signal) or plugged_in(leaf.signal)
    tokens = of_tokens(view, leaf, *_tokens_meant(view, leaf, pages, own, candidates))
    tokens = _over_heads(leaf, _over_queries(leaf, tokens))
    columns, starts = view.columns(pages)
    return np.maximum.reduceat(tokens[columns], starts)


def narrowest(
    view: View, leaf: ScorerPlan, pages: Sequence[Page], own: Sequence[Page], candidates: Sequence[Page]
) -> Array | None:
    """How narrowly the signal decided about each page, 1 being on the spot; None where it decides nothing itself."""
    if leaf.signal not in MARGINS:
        return None
    margins = MARGINS[leaf.signal](view, leaf, *_tokens_meant(view, leaf, pages, own, candidates))
    by_token = margins.reshape(-1, len(view.tokens))
    columns, starts = view.columns(pages)
    by_page = np.split(by_token[:, columns], starts[1:], axis=1)
    return np.array([ratios.flat[np.abs(ratios - 1).argmin()] for ratios in by_page])


def _tokens_meant(
    view: View, leaf: ScorerPlan, pages: Sequence[Page], own: Sequence[Page], candidates: Sequence[Page]
) -> tuple[Array, Array]:
    """``over`` and ``ranked``, as token signals take them."""
    everything = np.ones(len(view.tokens), dtype=bool)
    over = {"cache": everything, "pool": view.holds(own), "candidates": view.holds(candidates)}[leaf.over]
    return over & view.read, view.holds(own if leaf.signal == "key-anchor" else pages)


@cache
def plugged_in(name: str) -> Callable[..., Array]:
    """The NumPy recipe of a plug-in's signal, whose results are checked. Raises UsageError where there is none."""
    function, whose = recipe(name, "numpy"), f"the NumPy recipe of the signal `{name}` of {origin(name)}"
    if function is None:
        raise UsageError(f"{whose} is missing: without it nothing says what the signal means")

    def checked(view: View, leaf: ScorerPlan, *given: Any) -> Array:
        try:
            values = np.asarray(function(view, leaf, *given), dtype=float)
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise UsageError(f"{whose} failed: {type(error).__name__}: {error}") from error
        count = len(given[0]) if definition(name).units else len(view.tokens)
        if values.ndim not in (1, 3) or values.shape[-1] != count:
            what = "unit" if definition(name).units else "token"
            raise UsageError(
                f"{whose} gives {values.shape}, and a number for each of the {count} {what}s is wanted: [{what}s], or "
                f"[query heads of the KV head, queries, {what}s]"
            )
        if not np.isfinite(values).all():
            raise UsageError(f"{whose} gives numbers that are not finite")
        return values

    return checked


def _over_queries(leaf: ScorerPlan, values: Array) -> Array:
    """[G, queries, n] -> [G, n]: summed, or the mean of the last w."""
    if values.ndim == 1:
        return values
    return values.mean(axis=1) if isinstance(leaf.queries, int) else values.sum(axis=1)


def _over_heads(leaf: ScorerPlan, values: Array) -> Array:
    """[G, n] -> [n]. (After logits-max, attention has one head left.)"""
    if values.ndim == 1:
        return values
    if leaf.heads == "mean":
        return values.mean(axis=0)
    return values.sum(axis=0) if leaf.heads == "sum" else values.max(axis=0)


def _unit_length(vectors: Array) -> Array:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms == 0, 1.0, norms)
