"""A prompt pass in chunks, an update after each: every layer takes them one after the other, by itself.

What the next layer sees of a chunk depends on this layer's chunks up to it, and on nothing later. So the model is
called once with the whole prompt, and each layer goes through it with clocks that stand at the end of each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.attention import Formula
from kvpolicy.runtime.clocks import Clocks, Places, StreamClock

Attend = Callable[[Tensor, Tensor, Tensor, Formula], Tensor]


@dataclass(frozen=True)
class Chunk:
    """The next n tokens of each row of a prompt pass; fewer where a row has no more.

    ``columns`` [B, n] says where in the pass they stand and ``valid`` [B, n] which are tokens at all: a row's come
    first. ``clocks`` stand where they do once these tokens are in. ``position``, ``places`` and ``traits`` are as of a
    pass of its own.
    """

    columns: Tensor
    valid: Tensor
    clocks: Clocks
    position: Tensor
    places: Places
    traits: Mapping[str, Tensor]

    def of(self, tensor: Tensor) -> Tensor:
        """The chunk's part [B, heads, n, D] of what a pass brings [B, heads, N, D]."""
        index = self.columns[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index)

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write the chunk's attention [B, n, Q, D] into the pass's [B, N, Q, D]."""
        row, place = self.valid.nonzero(as_tuple=True)
        whole[row, self.columns[row, place]] = part[row, place]


def cut(clocks: Clocks, valid: Tensor, traits: Mapping[str, Tensor], size: int) -> tuple[Chunk, ...]:
    """Advance the clocks over a prompt pass of the tokens ``valid`` [B, N], with a stop at every ``size`` of a row."""
    lengths = valid.sum(1)
    order = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)  # a row's tokens first, in order
    chunks = []
    for start in range(0, max(1, int(lengths.max())), size):
        columns = order[:, start : start + size]
        inside = torch.arange(start, start + columns.shape[1], device=valid.device) < lengths[:, None]
        own = {name: flags.gather(1, columns) & inside for name, flags in traits.items()}
        before = [clock.turn_tokens.clone() for clock in clocks.streams]
        position, places = clocks.prompt(inside, own)
        standing = _standing(clocks, before, inside)
        chunks.append(Chunk(columns, inside, standing, position, places, own))
    return tuple(chunks)


def _standing(clocks: Clocks, before: list[Tensor], inside: Tensor) -> Clocks:
    """The clocks as they are now; ``turn_tokens`` of a row are those of this chunk alone."""
    now = copy(clocks)
    now.prompt_len, now.turn_tokens = clocks.prompt_len.clone(), inside.sum(1)
    now.streams = [_stream(clock, heard, inside.shape[1]) for clock, heard in zip(clocks.streams, before, strict=True)]
    return now


def _stream(clock: StreamClock, heard: Tensor, columns: int) -> StreamClock:
    now = copy(clock)
    now.seen, now.turn_tokens, now.heard = clock.seen.clone(), clock.turn_tokens.clone(), heard
    if now.turn_room:
        now.turn_room = int((now.turn_tokens - heard).max()) if clock.stream.traits else columns
    return now


def attend_in_chunks(layer: Any, query: Tensor, key: Tensor, value: Tensor, attend: Attend, formula: Formula) -> Tensor:
    """Attention [B, N, Q, D] of a prompt pass; ``attend`` does a pass by the layer's moment and clocks."""
    moment, clocks = layer.moment, layer.clocks
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    try:
        for number, chunk in enumerate(moment.chunks):
            layer.moment, layer.clocks = moment.at(number), chunk.clocks
            chunk.put(attend(chunk.of(query), chunk.of(key), chunk.of(value), formula), out)
            if layer.shows_reading:
                layer.after_chunks[number:] = [layer.state.all_positions.clone()]
    finally:
        layer.moment, layer.clocks = moment, clocks
    return out
