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
        lives: of milestones, from their own query to the last look. silences: of phoenixes, the longest.
        in_use: generated tokens that were past their window and not yet looked at for the last time, the most at any
            query [L, H].
        last_sink: position of the last sink of each head, -1 where there is none [L, H].
    """

    name: str
    prompt: int
    length: int
    counts: Array
    attention: Array
    lives: Times
    silences: Times
    in_use: Array
    last_sink: Array


def facts(name: str, prompt: int, layers: Mapping[int, Sorted], local: int) -> Facts:
    """Of a text that was read; ``local`` as in the rules."""
    tokens = list(layers.values())
    kind = np.stack([layer.kind for layer in tokens])
    length = kind.shape[2]
    parts = np.split(kind, [min(prompt, length)], axis=2)
    counts = np.stack([np.stack([(part == k).sum(2) for k in Kind], -1) for part in parts], 2)
    life, woke = (np.stack([getattr(layer, what) for layer in tokens]) for what in ("life", "woke"))
    alive, gap = (np.stack([getattr(layer, what) for layer in tokens]) for what in ("alive", "gap"))
    milestone, phoenix = kind == Kind.MILESTONE, kind == Kind.PHOENIX
    sinks = kind == Kind.SINK
    last_look = np.arange(length) + life
    return Facts(
        name=name,
        prompt=min(prompt, length),
        length=length,
        counts=counts,
        attention=_attention(kind, tokens),
        lives=Times(*np.nonzero(milestone), life[milestone], np.where(alive, -1, last_look)[milestone]),
        silences=Times(*np.nonzero(phoenix), gap[phoenix], woke[phoenix]),
        in_use=_in_use(np.isin(kind, _OLDER), last_look, prompt, local),
        last_sink=np.where(sinks.any(2), length - 1 - sinks[:, :, ::-1].argmax(2), -1),
    )


def _attention(kind: Array, tokens: list[Sorted]) -> Array:
    """[L, H, 6]"""
    new, old = (np.stack([getattr(layer, what) for layer in tokens]) for what in ("new_mass", "old_mass"))
    sinks = kind == Kind.SINK
    taken = [(new + old) * sinks, new * ~sinks, *(old * (kind == k) for k in _OLDER)]
    taken.append(old * ~np.isin(kind, (Kind.SINK, *_OLDER)))
    sums = np.stack([part.sum(2) for part in taken], -1)
    shares: Array = sums / np.maximum(sums.sum(-1, keepdims=True), 1e-12)
    return shares


def _in_use(looked: Array, last: Array, prompt: int, local: int) -> Array:
    """[L, H]"""
    layers, heads, length = looked.shape
    change = np.zeros((layers, heads, length + 1), dtype=int)
    for begin in range(prompt, length - local):
        here = looked[:, :, begin]
        stop = np.where(here, last[:, :, begin] + 1, 0)
        layer, head = np.nonzero(here & (stop > begin + local))
        change[layer, head, begin + local] += 1
        change[layer, head, stop[layer, head]] -= 1
    most: Array = change.cumsum(2).max(2)
    return most
