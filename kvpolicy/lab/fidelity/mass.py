"""Attention mass kept: how much of what a query would give to the whole text goes to tokens that the policy left it.

At a place of the output, in one layer, the query of a KV head's query heads is held against the keys of all tokens so
far, as this very run computed them: those that were evicted, too. Of the softmax over them all, the share counts that
lies on tokens which the query met: resident when it came, its own token among them, and read where a policy reads a
part. 1 is the full cache. It is the mean over the layers that the policy governs, and over their query heads.

A model's cap on logits is applied; sinks take nothing here, for no policy can evict them. Where positions are compact,
queries and keys are those that the model rotated, at their own positions.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from kvpolicy.attention import Formula
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.moment import GIVEN, PROMPT

EVERY = 16
"""Of so many places, the mass is measured at one: it is dear, and its neighbours are much like it."""


class Mass:
    """Looks on while texts are led through a cache; a context manager. Eager passes only: a graph would pass it by.

    ``by_place``: by place of the output, the mass of each row [B]; places 1, 1 + ``every``, and so on. The first place,
    0, is asked of the prompt, of which every policy reads all.
    """

    def __init__(self, cache: PolicyCache, every: int = EVERY) -> None:
        self.cache, self.every = cache, every
        self.parts = [_Watched(self, part) for part in cache.parts()]
        self.heads = sum(part.layer.state.position.shape[1] for part in self.parts)
        self.by_place: dict[int, Tensor] = {}

    def __enter__(self) -> Mass:
        for part in self.parts:
            part.begin()
        return self

    def __exit__(self, *error: object) -> None:
        for part in self.parts:
            part.end()
        self.parts = []  # they know this object, and a cache would be held until the garbage is collected

    def add(self, place: int, mass: Tensor) -> None:
        """What one part found [B, K]."""
        self.by_place[place] = self.by_place.get(place, 0) + mass.sum(1).double() / self.heads


class _Watched:
    """Stands in for ``forward`` of a group of heads with equal pools, and keeps the keys of all that came by."""

    def __init__(self, mass: Mass, layer: Any) -> None:
        self.mass, self.layer = mass, layer
        plan = mass.cache.plan
        rows, heads, _, size = layer.state.keys.shape
        self.keys = layer.state.keys.new_zeros(rows, heads, plan.prompt[1] + plan.max_new_tokens, size)
        self.place = 0
        self.inside = False  # a pass of many tokens, of which each step comes by as well

    def begin(self) -> None:
        self.layer.forward = self

    def end(self) -> None:
        del self.layer.forward

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
        layer = self.layer
        many = layer.moment.kind in (PROMPT, GIVEN)
        if not self.inside:
            self._keep(key, layer.query_position)
        if many:
            self.inside = True
            try:
                return self._pass(query, key, value, formula)
            finally:
                self.inside = False
        self.place += 1
        if (self.place - 1) % self.mass.every:
            return self._pass(query, key, value, formula)
        position = layer.clocks.position
        before, layer.shows_reading = layer.positions().clone(), True
        try:
            out = self._pass(query, key, value, formula)
        finally:
            layer.shows_reading = False
        self.mass.add(self.place, self._share(query, self._met(self._read(before), position), position, formula))
        return out

    def _pass(self, *given: Any) -> Tensor:
        out: Tensor = type(self.layer).forward(self.layer, *given)
        return out

    def _keep(self, key: Tensor, position: Tensor) -> None:
        """Keys [B, K, N, D] of tokens at positions [B, N], -1 for padding."""
        row, column = (position >= 0).nonzero(as_tuple=True)
        self.keys[row, :, position[row, column]] = key[row, :, column]

    def _read(self, positions: Tensor) -> Tensor:
        """Of the positions by slot [B, K, S] before a pass, those that it has read; -1 elsewhere."""
        for name, chosen in self.layer.chosen.items() if self.layer.readers else ():
            pool = self.layer.state.pools[name]
            units = torch.zeros(*chosen.shape[:2], pool.units + 1, dtype=torch.bool, device=chosen.device)
            units.scatter_(-1, torch.where(chosen < 0, pool.units, chosen), True)
            span = self.layer.state.span(pool)
            unread = ~units[..., :-1].repeat_interleave(pool.page, dim=-1)
            positions[:, :, span] = positions[:, :, span].masked_fill(unread, -1)
        return positions

    def _met(self, positions: Tensor, newest: Tensor) -> Tensor:
        """Tokens as the query met them [B, K, T], from their positions [B, K, S] and its own [B]."""
        length = self.keys.shape[2]
        met = torch.zeros(*positions.shape[:2], length + 1, dtype=torch.bool, device=positions.device)
        met.scatter_(2, torch.where(positions < 0, length, positions), True)
        met.scatter_(2, newest[:, None, None].expand(*met.shape[:2], 1), True)
        return met[..., :length]

    def _share(self, query: Tensor, met: Tensor, newest: Tensor, formula: Formula) -> Tensor:
        """The mass [B, K], the mean over the query heads of each KV head."""
        until = int(newest.max()) + 1
        grouped = rearrange(query, "b (k g) 1 d -> b k g d", k=self.keys.shape[1])
        products = torch.matmul(grouped, self.keys[:, :, :until].transpose(-1, -2)).float()
        logits = formula.capped(products * formula.scaling)
        later = torch.arange(until, device=newest.device) > newest[:, None]
        probabilities = logits.masked_fill(later[:, None, None], float("-inf")).softmax(-1)
        return (probabilities * met[:, :, None, :until]).sum(-1).mean(-1)
