"""Sorts tokens into classes by what a stream noted of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvpolicy.lab.analyze.rules import Kind, Rules
from kvpolicy.lab.analyze.stream import Notes

Array = np.ndarray


@dataclass(frozen=True)
class Sorted:
    """The tokens of one layer of one text, [H, T] each.

    Attributes:
        kind: numbers of ``Kind``. life: queries from a token's own to the last that looked at it, or to which it was
            new. alive: whether one of the last ``silence`` queries looked at it, so that its life may go on.
        gap, woke, looks, new_mass, old_mass: see ``Notes``.
    """

    kind: Array
    life: Array
    alive: Array
    gap: Array
    woke: Array
    looks: Array
    new_mass: Array
    old_mass: Array


def sort(notes: Notes, rules: Rules) -> Sorted:
    """The class of every token. Of several that would fit, the first in the order of ``Kind`` counts."""
    length = notes.length
    token = np.arange(length)
    observed = length - np.maximum(token + rules.local, rules.begin)  # queries that could have looked at it
    mostly = notes.looks >= rules.mostly * observed
    looked = notes.looks > 0
    alive = looked & (notes.last >= length - rules.silence)
    conditions = {
        Kind.UNJUDGED: np.broadcast_to(observed < rules.silence, looked.shape),
        Kind.SINK: looked & mostly & (token < rules.first),
        Kind.PHOENIX: notes.wakes > 0,
        Kind.HEAVY_HITTER: looked & mostly & alive,
        Kind.MILESTONE: looked,
        Kind.LOCAL: notes.paid >= rules.new,
    }
    kind = np.select(list(conditions.values()), list(conditions), default=Kind.LAZY).astype(np.int8)
    last = np.where(looked, notes.last, token + rules.local - 1)
    return Sorted(kind, last - token, alive, notes.gap, notes.woke, notes.looks, notes.new_mass, notes.old_mass)
