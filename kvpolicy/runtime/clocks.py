"""What time it is: per row, and per order of arrival. Advanced once a pass by the host, read by every layer.

Graphs read only the tensors, which keep their addresses; the host keeps its own integers, which no graph reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.plan import Plan, Stream

TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}


@dataclass
class StreamClock:
    """How far one order of arrival has come, per row [B].

    ``seen`` tokens ever admitted; ``fill`` tokens in the newest page (the page size where it is closed); ``opened``
    counts the units that generated tokens have opened; ``ordinal`` is the newest generated token's place in the order.
    ``host_fills`` are the values that ``fill`` may have in some row, known without asking the device.
    """

    stream: Stream
    seen: Tensor
    fill: Tensor
    opened: Tensor
    ordinal: Tensor

    def __post_init__(self) -> None:
        self.host_fills = {self.stream.page}
        self.opened_now = False

    def reset(self) -> None:
        self.seen.zero_()
        self.fill.fill_(self.stream.page)
        self.host_fills = {self.stream.page}
        self.opened.zero_()

    def close(self, rows: Tensor) -> None:
        """Close the open page of ``rows`` [B]: the next token opens a new one."""
        self.fill.masked_fill_(rows, self.stream.page)
        self.host_fills.add(self.stream.page)

    def count_one(self) -> None:
        """The host's half of a token in every row: it notes whether any row opens a unit (``opened_now``)."""
        page = self.stream.page
        self.opened_now = page in self.host_fills
        if page > 1:
            self.host_fills = {1 if fill == page else fill + 1 for fill in self.host_fills}

    def admit_one(self) -> None:
        """The device's half: every row admits one token."""
        if self.stream.page > 1:
            opens = self.fill == self.stream.page
            self.fill.copy_(torch.where(opens, 1, self.fill + 1))
            self.opened += opens
        else:
            self.opened += 1
        self.ordinal.copy_(self.seen)
        self.seen += 1

    def end_turn(self, turn_tokens: Tensor, host_turn_tokens: set[int]) -> None:
        """A prompt turn of ``turn_tokens`` [B] ended: its last page stays open. Rows without any had no turn."""
        page, admitted = self.stream.page, "prompt" in self.stream.admits
        if admitted:
            self.fill.copy_(torch.where(turn_tokens > 0, (turn_tokens - 1) % page + 1, self.fill))
        before = self.host_fills if 0 in host_turn_tokens else set()
        self.host_fills = before | {(n - 1) % page + 1 if admitted else page for n in host_turn_tokens if n}


class Clocks:
    """The row clocks of one cache: ``t`` generated and ``prompt_len`` prompt tokens of each row, padding left out.

    ``position`` [B] is the place of the newest generated token in its row's text.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        tensors = {b.name: torch.zeros(b.shape, dtype=TORCH_DTYPES[b.dtype], device=device) for b in plan.clocks}
        self.t, self.prompt_len, self.position = tensors["t"], tensors["prompt_len"], tensors["position"]
        self.streams = [
            StreamClock(stream, *(tensors[f"{name}.{i}"] for name in ("seen", "fill", "opened", "ordinal")))
            for i, stream in enumerate(plan.streams)
        ]
        self.turn_tokens = torch.zeros_like(self.t)
        self.reset()

    def tensors(self) -> list[Tensor]:
        """Every tensor with one entry per row, for reordering and for counting bytes."""
        own = [self.t, self.prompt_len, self.position]
        return own + [part for clock in self.streams for part in (clock.seen, clock.fill, clock.opened, clock.ordinal)]

    def reset(self) -> None:
        self.host_t = 0
        self.columns = 0  # seen by the model, padding included: what transformers slices its inputs by
        for tensor in (self.t, self.prompt_len, self.position, self.turn_tokens):
            tensor.zero_()
        for clock in self.streams:
            clock.reset()

    def count(self) -> None:
        """A generated pass, one token in every row: the host's half, which no graph reads."""
        self.host_t += 1
        self.columns += 1
        for clock in self.streams:
            if "generated" in clock.stream.admits:
                clock.count_one()

    def advance(self) -> None:
        """A generated pass: the device's half, which can be recorded and replayed."""
        self.position.copy_(self.prompt_len + self.t)
        self.t += 1
        for clock in self.streams:
            if "generated" in clock.stream.admits:
                clock.admit_one()

    def open_turn(self) -> None:
        """A prompt turn begins."""
        self.turn_tokens.zero_()

    def prompt(self, valid: Tensor) -> Tensor:
        """A prompt pass of the tokens ``valid`` [B, N]: returns their positions [B, N], -1 for padding."""
        before = self.prompt_len + self.t
        position = torch.where(valid, before[:, None] + valid.long().cumsum(1) - 1, -1)
        tokens = valid.sum(1)
        begins = (self.turn_tokens == 0) & (tokens > 0)
        self.prompt_len += tokens
        self.turn_tokens += tokens
        for clock in self.streams:
            clock.close(begins)
            if "prompt" in clock.stream.admits:
                clock.seen += tokens
        return position

    def close_turn(self) -> None:
        """The turn's last pass: the host learns the rows' lengths (a prompt pass may ask the device)."""
        lengths = set(self.turn_tokens.tolist())
        for clock in self.streams:
            clock.end_turn(self.turn_tokens, lengths)
