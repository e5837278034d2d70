"""Slots that are read once for a stretch of tokens that are all known, and not for each of them anew.

Between two tokens hardly a slot changes. So their queries are held against all keys at once, and all values are read
once at the end; what enters on the way, and what it takes the place of, is put right by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kvpolicy.attention import Formula, attention_probabilities
from kvpolicy.runtime.state import LayerState

AT_ONCE = 16
"""Tokens of a stretch."""


class Ahead:
    """The next n <= ``AT_ONCE`` queries against all slots of a layer [B, K, S], whose keys and values only a token that
    enters writes.

    ``logits`` are their scaled products with the keys that lay there at first. A token that enters replaces a column of
    them for those behind it. ``paid`` is what each of them pays to the slots. It is held against the values at the end:
    ``lost`` then says what a slot held before a token entered, in place of that token's value, for those before it.

    Args:
        query: [B, Q, n, D]. key: [B, K, n, D]. room: tensors that others like this one may use, too, one at a time.
    """

    def __init__(
        self, state: LayerState, query: Tensor, key: Tensor, formula: Formula, room: dict[Any, Tensor]
    ) -> None:
        self.state, self.formula, self.count = state, formula, query.shape[2]
        rows, heads, slots, size = state.keys.shape
        group, wide = query.shape[1] // heads, state.values.shape[3]
        # Always room for AT_ONCE: what is compiled is compiled for one shape.
        grouped = rearrange(query * formula.scaling, "b (k g) n d -> b k n g d", k=heads)
        missing = AT_ONCE - self.count
        queries = F.pad(grouped, (0, 0, 0, 0, 0, missing)).reshape(rows, heads, AT_ONCE * group, size)

        def made(name: str, *shape: int, dtype: torch.dtype) -> Tensor:
            which = (name, shape, dtype)
            if which not in room:
                room[which] = torch.zeros(shape, dtype=dtype, device=query.device)
            return room[which]

        number = state.keys.dtype
        products = made("products", rows, heads, AT_ONCE * group, slots, dtype=number)
        torch.matmul(queries, state.keys.transpose(2, 3), out=products)
        own = torch.matmul(queries, F.pad(key, (0, 0, 0, missing)).transpose(2, 3)).float()
        self.logits = products.float().unflatten(2, (AT_ONCE, group))
        self.own = rearrange(own, "b k (n g) j -> j b k n g", g=group).contiguous()
        self.paid = made("paid", rows, heads, AT_ONCE, group, slots, dtype=number)
        self.lost = made("lost", AT_ONCE, rows, heads, wide, dtype=number)
        self.places = made("places", AT_ONCE, rows, heads, dtype=torch.int64)
        self.places[self.count :] = 0  # another layer may have had more slots
        self.rows, self.heads = state.rows, state.heads
        self._by_token = [each.unbind(axis) for each, axis in ((self.logits, 2), (self.paid, 2), (self.lost, 0))]
        self._by_token += [self.places.unbind(), tuple(self.own[place, :, :, place] for place in range(AT_ONCE))]
        self.slot = torch.arange(slots, device=query.device)

    def come_to(self, number: int) -> None:
        """The token of this number is next."""
        self.number = number
        self.now_logits, self.now_paid, self.now_lost, self.now_place, self.now_own = (
            each[number] for each in self._by_token
        )

    def enter(self, place: Tensor, value: Tensor) -> None:
        """It is about to enter the slots ``place`` [B, K], with its value [B, K, D]."""
        self.now_place.copy_(place)
        self.now_lost.copy_(self.state.values[self.rows, self.heads, place] - value)

    def attend(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Its logits and probabilities [B, K, G, S]; ``hidden`` [B, K, S] are empty slots."""
        here = self.slot == self.now_place[..., None]
        logits = torch.where(here[:, :, None], self.now_own[..., None], self.now_logits)
        logits = self.formula.capped(logits).masked_fill(hidden[:, :, None], float("-inf"))
        return logits, attention_probabilities(logits, self.formula)

    def pay(self, probabilities: Tensor) -> None:
        """What it pays to each slot [B, K, G, S]."""
        self.now_paid.copy_(probabilities)

    def leave(self) -> None:
        """The token has been taken: those behind it find its key."""
        if self.number + 1 < self.count:
            self.logits[self.rows, self.heads, :, :, self.now_place] = self.own[self.number]

    def attended(self) -> Tensor:
        """Attention [B, n, Q, D]."""
        paid = self.paid.flatten(2, 3)
        out = torch.matmul(paid, self.state.values)
        places = rearrange(self.places, "j b k -> b k 1 j").expand(-1, -1, paid.shape[2], -1)
        later = torch.arange(AT_ONCE, device=out.device)
        before = (later > later[:, None]) & (later < self.count)
        there = paid.gather(3, places).unflatten(2, (AT_ONCE, -1)) * before[:, None]
        out = out + torch.matmul(there.flatten(2, 3), rearrange(self.lost, "j b k d -> b k j d"))
        return rearrange(out, "b k (n g) d -> b n (k g) d", n=AT_ONCE)[:, : self.count]
