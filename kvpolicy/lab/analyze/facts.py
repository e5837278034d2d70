"""What one text says about a model: counts, attention and times of its tokens' classes, by layer and head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kvpolicy.lab.analyze.classes import Sorted
from kvpolicy.lab.analyze.rules import Kind

Array = np.ndarray

PARTS = ("sink", "window", "heavy-hitter", "milestone", "phoenix", "rest")
"""Where attention goes: to sinks; to tokens while they are new; later, to those of a class; and to all others."""

_OLDER = (Kind.HEAVY_HITTER, Kind.MILESTONE, Kind.PHOENIX)

PROMPT, OUTPUT = 0, 1


@dataclass(frozen=True)
class Times:
    """N tokens of a class, each in a head: ``layer`` is an index into the layers that were read, ``queries`` how long,
    and ``at`` the query at which it ended, -1 where it may go on."""

    layer: Array
    head: Array
    token: Array
    queries: Array
    at: Array

    def __len__(self) -> int:
        return len(self.token)


@dataclass(frozen=True)
class Facts:
    """One text of ``length`` tokens, the first ``prompt`` of which are its prompt.

    Attributes:
        counts: tokens [L, H, 2, Kind], of the prompt and of the output.
        attention: shares of it that go to ``PARTS`` [L, H, 6].
        lives: of milestones, from their own query to the last look. pauses: of the same, the longest in between.
        silences: of phoenixes, the longest.
        in_use: generated milestones and heavy hitters of each KV head, past their window and not yet looked at for the
            last time by any of its query heads, the most at any query [L, K]. with_phoenixes: these counted in.
        asked: share of the prompt's judged tokens at which a generated token looked when they were no longer new
            [L, K]. woken: of all of them, the share that are phoenixes which a generated token woke [L, K].
        last_sink: position of the last sink of each head, -1 where there is none [L, H].
    """

    name: str
    prompt: int
    length: int
    counts: Array
    attention: Array
    lives: Times
    pauses: Times
    silences: Times
    in_use: Array
    with_phoenixes: Array
    asked: Array
    woken: Array
    last_sink: Array


def facts(name: str, prompt: int, layers: Mapping[int, Sorted], local: int, group: int = 1) -> Facts:
    """Of a text that was read; ``local`` as in the rules, and ``group`` query heads in a row share a KV head."""
    tokens = list(layers.values())
    kind = np.stack([layer.kind for layer in tokens])
    length = kind.shape[2]
    parts = np.split(kind, [min(prompt, length)], axis=2)
    counts = np.stack([np.stack([(part == k).sum(2) for k in Kind], -1) for part in parts], 2)
    life, woke = (np.stack([getattr(layer, what) for layer in tokens]) for what in ("life", "woke"))
    alive, gap = (np.stack([getattr(layer, what) for layer in tokens]) for what in ("alive", "gap"))
    looks = np.stack([layer.looks for layer in tokens])
    milestone, phoenix = kind == Kind.MILESTONE, kind == Kind.PHOENIX
    sinks = kind == Kind.SINK
    last_look = np.arange(length) + life
    ended = np.where(alive, -1, last_look)
    return Facts(
        name=name,
        prompt=min(prompt, length),
        length=length,
        counts=counts,
        attention=_attention(kind, tokens),
        lives=_times(milestone, life, ended),
        pauses=_times(milestone, gap, ended),
        silences=_times(phoenix, gap, woke),
        in_use=_in_use(milestone | (kind == Kind.HEAVY_HITTER), last_look, prompt, local, group),
        with_phoenixes=_in_use(np.isin(kind, _OLDER), last_look, prompt, local, group),
        asked=_of_prompt((looks > 0) & (last_look >= prompt), kind, prompt, group),
        woken=_of_prompt((kind == Kind.PHOENIX) & (woke >= prompt), kind, prompt, group),
        last_sink=np.where(sinks.any(2), length - 1 - sinks[:, :, ::-1].argmax(2), -1),
    )


def _times(chosen: Array, queries: Array, at: Array) -> Times:
    layer, head, token = np.nonzero(chosen)
    return Times(layer, head, token, queries[chosen], at[chosen])


def _attention(kind: Array, tokens: list[Sorted]) -> Array:
    """[L, H, 6]"""
    new, old = (np.stack([getattr(layer, what) for layer in tokens]) for what in ("new_mass", "old_mass"))
    sinks = kind == Kind.SINK
    taken = [(new + old) * sinks, new * ~sinks, *(old * (kind == k) for k in _OLDER)]
    taken.append(old * ~np.isin(kind, (Kind.SINK, *_OLDER)))
    sums = np.stack([part.sum(2) for part in taken], -1)
    shares: Array = sums / np.maximum(sums.sum(-1, keepdims=True), 1e-12)
    return shares


def _in_use(looked: Array, last: Array, prompt: int, local: int, group: int) -> Array:
    """[L, K]"""
    looked, last = (_grouped(tokens, group).max(2) for tokens in (looked, np.where(looked, last, 0)))
    layers, heads, length = looked.shape
    change = np.zeros((layers, heads, length + 1), dtype=int)
    for token in range(prompt, length - local):
        stop = np.where(looked[:, :, token], last[:, :, token] + 1, 0)
        layer, head = np.nonzero(stop > token + local)
        change[layer, head, token + local] += 1
        change[layer, head, stop[layer, head]] -= 1
    most: Array = change.cumsum(2).max(2)
    return most


def _of_prompt(tokens: Array, kind: Array, prompt: int, group: int) -> Array:
    """The share of the prompt's judged tokens that are among ``tokens`` in one query head of a KV head [L, K]."""
    judged = kind[:, :, :prompt] != Kind.UNJUDGED
    chosen, all_of_them = (_grouped(flags, group).any(2).sum(2) for flags in (tokens[:, :, :prompt] & judged, judged))
    shares: Array = chosen / np.maximum(all_of_them, 1)
    return shares


def _grouped(tokens: Array, group: int) -> Array:
    """[L, H, T] as [L, K, group, T]"""
    layers, heads, length = tokens.shape
    return tokens.reshape(layers, heads // group, group, length)
