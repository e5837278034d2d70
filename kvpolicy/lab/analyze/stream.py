"""Watches rows of attention go by, and remembers of each token what its class depends on: O(tokens) per head.

The rows themselves are never kept. What is dense (thresholds and sums) is computed where the rows are, a GPU perhaps;
looks are few, and are noted down one by one in NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from kvpolicy.lab.analyze.rules import Rules

Array = np.ndarray

BLOCK_BYTES = 2**26
"""Of the rows of attention that exist at once."""


@dataclass
class Notes:
    """What is known of each token in each head [H, T].

    Attributes:
        looks: queries that looked at it. last: the newest of them, or the last to which it was new.
        gap: most queries in a row that did not look, before one that did. wakes: how many gaps were a silence.
        woke: the query that ended the latest silence, -1 if there was none.
        paid: attention that those to whom it was new paid it.
        new_mass: of it, what queries paid that are read. old_mass: what those paid to whom it was not new.
    """

    looks: Array
    last: Array
    gap: Array
    wakes: Array
    woke: Array
    paid: Array
    new_mass: Array
    old_mass: Array

    @property
    def length(self) -> int:
        """T."""
        return int(self.looks.shape[1])


class Stream:
    """One layer of one text: ``heads`` heads, whose attention is told in order, any number of rows at a time."""

    def __init__(self, heads: int, rules: Rules) -> None:
        self.heads, self.rules, self.length = heads, rules, 0
        self._room = 0
        whole = np.zeros((heads, 0), dtype=np.int32)
        mass = np.zeros((heads, 0))
        self._notes = Notes(whole, whole, whole, whole, whole, mass, mass, mass)

    def see(self, weights: Tensor | Array) -> None:
        """The next rows of attention.

        Args:
            weights: [H, N, T] of the N newest queries to all T tokens so far, each row summing up to 1; what lies
                after a query's own token is 0.

        Raises:
            ValueError: another shape: a row was left out or told twice, or there are other heads.
        """
        rows = torch.as_tensor(weights)
        heads, new, said = rows.shape
        if heads != self.heads or said != self.length + new:
            raise ValueError(f"rows of shape {tuple(rows.shape)} after {self.length} tokens in {self.heads} heads")
        first, self.length = self.length, said
        self._grow(said)
        rules, notes = self.rules, self._notes
        query = torch.arange(first, said, device=rows.device)
        begun = max(0, first - rules.local + 1)  # no older token is new to any of these queries
        fresh = query[:, None] - torch.arange(begun, said, device=rows.device) < rules.local
        new_part = rows[:, :, begun:] * fresh
        notes.paid[:, begun:said] += _numpy(new_part.sum(1))
        early = min(new, max(0, rules.begin - first))
        if early == new:
            return
        new_mass = new_part[:, early:].sum(1)
        notes.new_mass[:, begun:said] += _numpy(new_mass)
        notes.old_mass[:, :said] += _numpy(rows[:, early:].sum(1))
        notes.old_mass[:, begun:said] -= _numpy(new_mass)

        middle = query - rules.local + 1 - rules.first
        mass = rows[:, :, rules.first :].sum(-1) - new_part[:, :, max(0, rules.first - begun) :].sum(-1)
        least = (rules.times * mass / middle.clamp(min=1)).clamp(min=rules.least)
        looks = rows >= least[:, :, None]
        looks[:, :, begun:] &= ~fresh
        looks[:, :early] = False
        head, row, token = (_numpy(place) for place in looks.nonzero(as_tuple=True))
        self._note(head, row + first, token)

    def notes(self) -> Notes:
        """What is known after the rows so far."""
        return Notes(*(getattr(self._notes, field.name)[:, : self.length].copy() for field in fields(Notes)))

    def _note(self, head: Array, query: Array, token: Array) -> None:
        """Looks of these queries, all later than those that were noted before."""
        if not len(head):
            return
        order = np.lexsort((query, token, head))
        head, query, token = head[order], query[order], token[order]
        starts = np.flatnonzero(np.r_[True, (np.diff(head) != 0) | (np.diff(token) != 0)])
        place = head[starts], token[starts]
        notes = self._notes
        before = np.r_[-1, query[:-1]]
        before[starts] = notes.last[place]
        gaps = query - before - 1
        silences = gaps >= self.rules.silence
        notes.gap[place] = np.maximum(notes.gap[place], np.maximum.reduceat(gaps, starts))
        notes.woke[place] = np.maximum(notes.woke[place], np.maximum.reduceat(np.where(silences, query, -1), starts))
        notes.wakes[place] += np.add.reduceat(silences.astype(np.int32), starts)
        counts = np.diff(np.r_[starts, len(query)])
        notes.looks[place] += counts.astype(np.int32)
        notes.last[place] = query[starts + counts - 1]

    def _grow(self, length: int) -> None:
        """Room for so many tokens, doubled each time that it is too little."""
        if length <= self._room:
            return
        old, self._room = self._room, max(length, 2 * self._room, 256)
        token = np.arange(old, self._room, dtype=np.int32)
        empty = {
            "last": np.maximum(token + self.rules.local - 1, self.rules.begin - 1),
            "woke": np.full(len(token), -1),
        }
        for field in fields(Notes):
            known = getattr(self._notes, field.name)
            more = np.broadcast_to(empty.get(field.name, np.zeros(len(token))), (self.heads, len(token)))
            setattr(self._notes, field.name, np.concatenate([known, more.astype(known.dtype)], axis=1))


def rows_of(query: Tensor, key: Tensor, scaling: float) -> Iterator[Tensor]:
    """The attention of the newest queries to all keys, a few rows at a time, as ``Stream.see`` takes it.

    Args:
        query: [Q, N, D] of the N newest tokens; key: [K, T, D] of all tokens, in order of position, each KV head shared
            by Q / K query heads in a row.

    Yields:
        [Q, n, T'] float32, T' being the tokens up to the last of these rows.
    """
    heads, new, _ = query.shape
    kv_heads, said, size = key.shape
    grouped = query.float().reshape(kv_heads, heads // kv_heads, new, size)
    step = max(1, BLOCK_BYTES // (4 * heads * said))
    for begin in range(0, new, step):
        end = min(new, begin + step)
        until = said - new + end
        logits = torch.einsum("kgnd,ktd->kgnt", grouped[:, :, begin:end] * scaling, key[:, :until].float())
        ahead = torch.ones(end - begin, until, dtype=torch.bool, device=key.device).triu(until - (end - begin) + 1)
        yield logits.masked_fill_(ahead, -torch.inf).softmax(-1).reshape(heads, end - begin, until)


def _numpy(tensor: Tensor) -> Array:
    array: Array = tensor.cpu().numpy()
    return array
