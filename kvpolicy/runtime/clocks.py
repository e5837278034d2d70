"""What time it is: per row, and per order of arrival. Advanced once a pass by the host, read by every layer.

Graphs read only the tensors, which keep their addresses; the host keeps its own integers, which no graph reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    "uint8": torch.uint8,
    "bool": torch.bool,
}

Places = tuple[Tensor | None, ...]
"""By stream: where a pass's tokens stand in it [B, N]."""


@dataclass
class StreamClock:
    """How far one order of arrival has come, per row [B].

    ``seen`` tokens ever admitted; ``fill`` tokens in the newest page (the page size where it is closed); ``opened``
    counts the units that generated tokens have opened; ``ordinal`` is the newest generated token's place in the order.
    ``turn_tokens`` are the prompt tokens of the turn at hand. ``host_fills`` are the values that ``fill`` may have in
    some row, known without asking the device; ``turn_room`` is at least the most turn tokens of any row that wait in
    the workspace: all but the ``heard`` ones, which an update in the middle of the turn has been over.
    """

    stream: Stream
    seen: Tensor
    fill: Tensor
    opened: Tensor
    ordinal: Tensor

    def __post_init__(self) -> None:
        self.host_fills = {self.stream.page}
        self.opened_now = False
        self.turn_tokens = torch.zeros_like(self.seen)
        self.heard = torch.zeros_like(self.seen)
        self.turn_room = 0

    def reset(self) -> None:
        self.seen.zero_()
        self.fill.fill_(self.stream.page)
        self.host_fills = {self.stream.page}
        self.opened.zero_()
        self.open_turn()

    def open_turn(self) -> None:
        """A prompt turn begins."""
        self.turn_tokens.zero_()
        self.turn_room = 0

    def admit_prompt(self, enters: Tensor) -> Tensor:
        """A prompt pass brings the tokens ``enters`` [B, N]: returns their numbers within the turn, -1 elsewhere."""
        place = torch.where(enters, self.turn_tokens[:, None] + enters.long().cumsum(1) - 1, -1)
        tokens = enters.sum(1)
        self.seen += tokens
        self.turn_tokens += tokens
        # Where a trait decides, far fewer may enter than the pass has columns; a prompt pass may ask the device.
        self.turn_room = int(self.turn_tokens.max()) if self.stream.traits else self.turn_room + enters.shape[1]
        return place

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

    def end_turn(self, lengths: list[int]) -> None:
        """A prompt turn ended that brought so many tokens to each row: its last page stays open, or no page, where none
        of them came here. Rows without any had no turn."""
        page, own = self.stream.page, [0] * len(lengths)
        if self.stream.hears_prompts and page > 1:
            self.fill.copy_(torch.where(self.turn_tokens > 0, (self.turn_tokens - 1) % page + 1, self.fill))
            own = self.turn_tokens.tolist() if self.stream.traits else lengths
        before = self.host_fills if 0 in lengths else set()
        fills = {(mine - 1) % page + 1 if mine else page for all_, mine in zip(lengths, own, strict=True) if all_}
        self.host_fills = before | fills


class Clocks:
    """The row clocks of one cache: ``t`` generated and ``prompt_len`` prompt tokens of each row, padding left out.

    ``position`` [B] is the place of the newest generated token in its row's text. ``special`` [B, positions] says where
    special tokens stand, None where no pin asks: a token is special in every layer and head, whichever slot it lies in.
    """

    host_t: int
    columns: int

    def __init__(self, plan: Plan, device: torch.device) -> None:
        tensors = {b.name: torch.zeros(b.shape, dtype=TORCH_DTYPES[b.dtype], device=device) for b in plan.clocks}
        self.t, self.prompt_len, self.position = tensors["t"], tensors["prompt_len"], tensors["position"]
        self.streams = [
            StreamClock(stream, *(tensors[f"{name}.{i}"] for name in ("seen", "fill", "opened", "ordinal")))
            for i, stream in enumerate(plan.streams)
        ]
        self.turn_tokens = torch.zeros_like(self.t)
        self.special = tensors.get("special")
        self.reset()

    def extend(self, plan: Plan) -> None:
        """Room for the positions of a longer plan."""
        for buffer in plan.clocks:
            if buffer.name == "special" and self.special is not None:
                wider = torch.zeros(buffer.shape, dtype=torch.bool, device=self.special.device)
                wider[:, : self.special.shape[1]] = self.special
                self.special = wider

    def follow(self, other: Clocks) -> None:
        """Stand where the clocks of another device stand."""
        for own, theirs in zip(self.tensors(), other.tensors(), strict=True):
            own.copy_(theirs)
        self.host_t, self.columns = other.host_t, other.columns
        for clock, leads in zip(self.streams, other.streams, strict=True):
            clock.host_fills = set(leads.host_fills)

    def stand_at(self, before: Sequence[Tensor]) -> None:
        """Go back on the device to where ``tensors`` were of these values; what the host counts goes on."""
        for own, old in zip(self.tensors(), before, strict=True):
            own.copy_(old)

    def tensors(self) -> list[Tensor]:
        """Every tensor with one entry per row, for reordering and for counting bytes."""
        own = [self.t, self.prompt_len, self.position, *([] if self.special is None else [self.special])]
        return own + [part for clock in self.streams for part in (clock.seen, clock.fill, clock.opened, clock.ordinal)]

    def reset(self) -> None:
        self.host_t = 0
        self.columns = 0  # seen by the model, padding included: what transformers slices its inputs by
        for tensor in (self.t, self.prompt_len, self.position, self.turn_tokens):
            tensor.zero_()
        if self.special is not None:
            self.special.zero_()
        for clock in self.streams:
            clock.reset()

    def is_special(self, position: Tensor) -> Tensor:
        """Whether the tokens at these positions [B, K, S] are special; of no meaning where a slot is empty (-1)."""
        assert self.special is not None
        flags = self.special[:, None].expand(-1, position.shape[1], -1)
        return flags.gather(2, position.clamp(min=0).long())

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

    def coming(self, valid: Tensor) -> Tensor:
        """Where the columns of a pass that is to come stand in their rows' text [B, N], by which of them are tokens
        [B, N]; padding goes with what follows it."""
        before = self.prompt_len + self.t
        return before[:, None] + (valid.long().cumsum(1) - 1).clamp(min=0)

    def open_turn(self) -> None:
        """A prompt turn begins."""
        self.turn_tokens.zero_()
        for clock in self.streams:
            clock.open_turn()

    def prompt(self, valid: Tensor, traits: Mapping[str, Tensor]) -> tuple[Tensor, Places]:
        """A prompt pass of the tokens ``valid`` [B, N], some of which have ``traits``, each [B, N].

        Returns their positions [B, N], -1 for padding, and by stream their numbers within its turn [B, N], -1 where
        they go elsewhere; None for a stream that no prompt reaches.
        """
        position = torch.where(valid, self.coming(valid), -1)
        if self.special is not None:
            row, column = (traits["special"] & valid).nonzero(as_tuple=True)
            self.special[row, position[row, column]] = True
        tokens = valid.sum(1)
        begins = (self.turn_tokens == 0) & (tokens > 0)
        self.prompt_len += tokens
        self.turn_tokens += tokens
        places: list[Tensor | None] = []
        for clock in self.streams:
            clock.close(begins)
            hears = clock.stream.hears_prompts
            places.append(clock.admit_prompt(entering(clock.stream, valid, traits)) if hears else None)
        return position, tuple(places)

    def close_turn(self) -> None:
        """The turn's last pass: the host learns the rows' lengths (a prompt pass may ask the device)."""
        lengths = self.turn_tokens.tolist()
        for clock in self.streams:
            clock.end_turn(lengths)


def entering(stream: Stream, valid: Tensor, traits: Mapping[str, Tensor]) -> Tensor:
    """Which tokens [B, N] of a prompt pass come in a stream: those that it admits and no pool above has taken."""
    mine = valid if "prompt" in stream.admits else torch.zeros_like(valid)
    for trait in stream.admits & traits.keys():
        mine = mine | (traits[trait] & valid)
    for trait in stream.above & traits.keys():
        mine = mine & ~traits[trait]
    return mine
