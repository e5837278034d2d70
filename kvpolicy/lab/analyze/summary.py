"""Many texts together: shares of classes with intervals, kinds of heads and how stable they are, and times.

A head is *lazy* where ``quiet`` of its attention goes to sinks and to tokens that are new: it does without the rest of
the text. Any other head is named after the class that takes most of the rest, or *diffuse* where that is no class.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from kvpolicy.lab.analyze.facts import PARTS, PROMPT, Facts, Times
from kvpolicy.lab.analyze.rules import JUDGED, Rules

Array = np.ndarray

HEAD_KINDS = ("lazy", "heavy-hitter", "milestone", "phoenix", "diffuse")

ENOUGH = 3
"""Texts from which intervals are over texts; with fewer they are over tokens, as if each were drawn by itself."""

DRAWS = 1000
LEVEL = 0.95
Z = 1.959964
"""Of intervals: how often the texts are drawn anew, what share of the results they hold, and its normal quantile."""


@dataclass(frozen=True)
class Shares:
    """Shares with the ends of their intervals, arrays of one shape."""

    value: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Analysis:
    """What texts say about a model. ``layers`` are the numbers of those that were read, ``governed`` of all that a
    policy numbers from 0."""

    model: str
    rules: Rules
    layers: tuple[int, ...]
    governed: tuple[int, ...]
    texts: tuple[Facts, ...]
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @cached_property
    def counts(self) -> Array:
        """Judged tokens [text, L, H, 2, class]."""
        return np.stack([text.counts[..., list(JUDGED)] for text in self.texts])

    @property
    def basis(self) -> str:
        """What intervals are over: `texts` or `tokens`."""
        return "texts" if len(self.texts) >= ENOUGH else "tokens"

    def head_shares(self) -> Shares:
        """Of judged tokens, by layer, head and class [L, H, class]."""
        return intervals(self.counts.sum(3))

    def layer_shares(self) -> Shares:
        """[L, class]"""
        return intervals(self.counts.sum((2, 3)))

    def shares(self) -> Shares:
        """[class]"""
        return intervals(self.counts.sum((1, 2, 3)))

    def in_prompt(self) -> Shares:
        """Of the tokens of each class, the share that lies in the prompt [class]."""
        pairs = np.moveaxis(self.counts.sum((1, 2)), 1, 2)  # [text, class, 2]
        found = intervals(pairs)
        return Shares(*(getattr(found, name)[:, PROMPT] for name in ("value", "low", "high")))

    def prompt_share(self) -> float:
        """Of all judged tokens, the share that lies in the prompt: what a class would show that minds no place."""
        return float(self.counts[:, :, :, PROMPT].sum() / max(1, self.counts.sum()))

    def attention(self) -> Array:
        """Shares that go to ``PARTS``, texts weighing alike [L, H, 6]."""
        mean: Array = np.mean([text.attention for text in self.texts], axis=0)
        return mean

    def head_kinds(self) -> Array:
        """Numbers of ``HEAD_KINDS`` [L, H]."""
        return kinds_of(self.attention(), self.rules.quiet)

    def agreement(self) -> tuple[float, float] | None:
        """Of two texts, how often a head is of the same kind, and how often by chance; None for a single text."""
        each = [kinds_of(text.attention, self.rules.quiet).ravel() for text in self.texts]
        pairs = list(combinations(each, 2))
        if not pairs:
            return None
        often = [np.bincount(kinds, minlength=len(HEAD_KINDS)) / len(kinds) for kinds in each]
        chance = [float(a @ b) for a, b in combinations(often, 2)]
        return float(np.mean([(a == b).mean() for a, b in pairs])), float(np.mean(chance))

    def correlations(self) -> Array | None:
        """By class, the mean correlation over heads of its shares in two texts [class]; NaN where heads do not differ,
        None for a single text."""
        if len(self.texts) < 2:
            return None
        summed = self.counts.sum(3).reshape(len(self.texts), -1, len(JUDGED)).astype(float)
        shares = summed / np.maximum(summed.sum(-1, keepdims=True), 1)
        return np.array([_correlation(shares[:, :, number]) for number in range(len(JUDGED))])

    def lives(self, part: int | None = None) -> tuple[Array, Array]:
        """Of milestones (in the prompt or in the output): how long, and whether that is the end, not the text's."""
        chosen = [self._part(text, text.lives, part) for text in self.texts]
        return (
            np.concatenate([text.lives.queries[here] for text, here in zip(self.texts, chosen, strict=True)]),
            np.concatenate([text.lives.at[here] >= 0 for text, here in zip(self.texts, chosen, strict=True)]),
        )

    def silences(self, part: int | None = None) -> Array:
        """Of phoenixes (in the prompt or in the output): the longest silence of each."""
        chosen = [self._part(text, text.silences, part) for text in self.texts]
        return np.concatenate([text.silences.queries[here] for text, here in zip(self.texts, chosen, strict=True)])

    def woken_late(self) -> tuple[int, int]:
        """Phoenixes that a generated token woke: in the prompt, and in the output."""
        late = [(text.prompt, text.silences.token[text.silences.at >= text.prompt]) for text in self.texts]
        inside = sum(int((tokens < prompt).sum()) for prompt, tokens in late)
        return inside, sum(len(tokens) for _, tokens in late) - inside

    @staticmethod
    def _part(text: Facts, times: Times, part: int | None) -> Array:
        if part is None:
            return np.ones(len(times), dtype=bool)
        here: Array = (times.token < text.prompt) == (part == PROMPT)
        return here


def kinds_of(attention: Array, quiet: float) -> Array:
    """Of heads whose attention goes to ``PARTS`` like this [..., 6]: numbers of ``HEAD_KINDS``."""
    lazy = attention[..., PARTS.index("sink")] + attention[..., PARTS.index("window")] >= quiet
    kinds: Array = np.where(lazy, 0, 1 + attention[..., PARTS.index("heavy-hitter") :].argmax(-1))
    return kinds


def intervals(counts: Array) -> Shares:
    """Shares over the last axis of counts [text, …, class], and their intervals of ``LEVEL``.

    Over texts, by drawing them anew (percentiles); with fewer than ``ENOUGH`` of them over tokens, by Wilson's formula.
    """
    summed = counts.sum(0).astype(float)
    total = np.maximum(summed.sum(-1, keepdims=True), 1)
    value = summed / total
    if len(counts) < ENOUGH:
        middle, spread = value + Z**2 / (2 * total), Z * np.sqrt(value * (1 - value) / total + (Z / (2 * total)) ** 2)
        scale = 1 + Z**2 / total
        return Shares(value, np.maximum(0, middle - spread) / scale, np.minimum(scale, middle + spread) / scale)
    random = np.random.default_rng(0)
    drawn = random.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=DRAWS).astype(float)
    sums = (drawn @ counts.reshape(len(counts), -1)).reshape(DRAWS, *summed.shape)
    sums /= np.maximum(sums.sum(-1, keepdims=True), 1)
    low, high = np.quantile(sums, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Shares(value, np.minimum(low, value), np.maximum(high, value))


def survival(life: Array, ended: Array) -> tuple[Array, Array]:
    """The share of lives that last longer than so many queries, where some have not ended yet (Kaplan and Meier)."""
    times, place = np.unique(life, return_inverse=True)
    deaths = np.bincount(place, weights=ended, minlength=len(times))
    at_risk = len(life) - np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(times)))[:-1]])
    return times, np.cumprod(1 - deaths / np.maximum(at_risk, 1))


def life_quantile(life: Array, ended: Array, share: float) -> int | None:
    """The queries after which this share of lives has ended; None where the texts were too short to see it."""
    times, lasting = survival(life, ended)
    below = np.flatnonzero(lasting <= 1 - share)
    return int(times[below[0]]) if len(below) else None


def _correlation(shares: Array) -> float:
    """Mean over pairs of rows [text, head]."""
    if (shares.std(1) == 0).any():
        return float("nan")
    table = np.corrcoef(shares)
    return float(np.mean(table[np.triu_indices(len(shares), 1)]))


def versions() -> dict[str, str]:
    """Of what an analysis depends on."""
    import torch
    import transformers

    import kvpolicy

    told = {"kvpolicy": kvpolicy.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return told | {"python": platform.python_version()}


def to_dict(analysis: Analysis) -> dict[str, Any]:
    """For machines; shares are of judged tokens, and NaN is null."""
    words = [kind.word for kind in JUDGED]
    prompt, correlations = analysis.in_prompt(), analysis.correlations()
    agreement = analysis.agreement()
    classes = _named(analysis.shares(), words)
    for number, word in enumerate(words):
        classes[word]["in_prompt"] = _cell(prompt, number)
        stable = None if correlations is None or np.isnan(correlations[number]) else float(correlations[number])
        classes[word]["correlation_over_heads_between_texts"] = stable
    life, ended = analysis.lives()
    woken = analysis.woken_late()
    return {
        "model": analysis.model,
        "rules": vars(analysis.rules),
        "layers": list(analysis.layers),
        "texts": [{"name": text.name, "prompt": text.prompt, "tokens": text.length} for text in analysis.texts],
        "intervals": {"level": LEVEL, "over": analysis.basis},
        "classes": classes,
        "in_prompt": round(analysis.prompt_share(), 6),
        "attention": _named_parts(analysis.attention().mean((0, 1))),
        "milestones": {
            "count": len(life),
            "ended": int(ended.sum()),
            "life": {f"{share:.0%}": life_quantile(life, ended, share) for share in (0.5, 0.9)},
        },
        "phoenixes": {
            "count": len(analysis.silences()),
            "silence": _quantiles(analysis.silences()),
            "woken_by_generated_tokens": {"in_prompt": woken[0], "in_output": woken[1]},
        },
        "in_use": int(max(text.in_use.max() for text in analysis.texts)),
        "heads_of_same_kind_in_two_texts": None
        if agreement is None
        else {"share": agreement[0], "chance": agreement[1]},
        "heads": _heads(analysis),
        "seconds": analysis.seconds,
        "versions": analysis.versions,
    }


def _heads(analysis: Analysis) -> list[dict[str, Any]]:
    shares, attention, kinds = analysis.head_shares(), analysis.attention(), analysis.head_kinds()
    words = [kind.word for kind in JUDGED]
    return [
        {
            "layer": analysis.layers[layer],
            "head": head,
            "kind": HEAD_KINDS[kinds[layer, head]],
            "classes": _named(
                Shares(*(getattr(shares, name)[layer, head] for name in ("value", "low", "high"))), words
            ),
            "attention": _named_parts(attention[layer, head]),
        }
        for layer, head in np.ndindex(kinds.shape)
    ]


def _named(shares: Shares, words: Sequence[str]) -> dict[str, Any]:
    return {word: _cell(shares, number) for number, word in enumerate(words)}


def _cell(shares: Shares, number: int) -> dict[str, Any]:
    return {
        "share": round(float(shares.value[number]), 6),
        "low": round(float(shares.low[number]), 6),
        "high": round(float(shares.high[number]), 6),
    }


def _named_parts(shares: Array) -> dict[str, float]:
    return {name: round(float(share), 6) for name, share in zip(PARTS, shares, strict=True)}


def _quantiles(values: Array) -> dict[str, int | None]:
    shares = (0.5, 0.9)
    return {f"{share:.0%}": int(np.quantile(values, share)) if len(values) else None for share in shares}
