"""Keys and values in 8 or 4 bits (KIVI, arXiv:2402.02750): how they are stored, and attention over them.

A number x of a group is stored as its code, round((x - zero) / scale) in 0 ... 2^bits - 1, and read as code * scale +
zero: zero is the group's least number and scale a step, both in a float dtype of their own. Groups run

* by ``channel``, KIVI's way with keys: ``group`` neighbouring slots of one channel. scale and zero are
  [B, K, ceil(S / group), D]. A slot alone cannot be written: its whole group is quantised at once.
* by ``token``, KIVI's way with values: ``group`` neighbouring channels of one slot, [B, K, S, ceil(D / group)].

Codes are uint8: [B, K, S, D] with 8 bits, [B, K, S, D / 2] with 4, where the low half of a byte is channel d and the
high half channel d + D / 2, so that a kernel reads halves of a head and never has to interleave them; with 2 bits the
four quarters of a byte are channels d, d + D / 4, d + D / 2 and d + 3 D / 4 alike.

Plain torch: it defines ``kernels.quantised``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy.attention.formula import Formula
from kvpolicy.attention.parts import attend_part
from kvpolicy.errors import UsageError

BY = ("channel", "token")
BITS = (2, 4, 8)


@dataclass(frozen=True)
class Quantised:
    """What ``quantise`` makes of a tensor [B, K, S, D]; see the module."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    by: str


def quantise(tensor: Tensor, bits: int, group: int, by: str, dtype: torch.dtype = torch.float16) -> Quantised:
    """Store [B, K, S, D] in ``bits`` bits, with scale and zero of ``dtype`` for each group of ``group`` numbers.

    A number is off by at most half a step, and by what ``dtype`` rounds of zero and of the group's width.

    Raises:
        UsageError: bits other than 2, 4 and 8, a head size that fills no bytes, a group that is no positive number.
    """
    if bits not in BITS or by not in BY or group < 1:
        raise UsageError(
            f"numbers are stored in 2, 4 or 8 bits, in groups of 1 or more, by channel or by token; "
            f"not in {bits} bits, in groups of {group}, by {by}"
        )
    together = 8 // bits
    if tensor.shape[-1] % together:
        size = tensor.shape[-1]
        raise UsageError(f"{bits} bits put {together} numbers into a byte, which the head size {size} does not fill")
    axis, most = (2 if by == "channel" else 3), (1 << bits) - 1
    low, high = _extremes(tensor.float(), axis, group)
    zero = low.to(dtype)
    scale = ((high - zero.float()) / most).clamp(min=0).to(dtype)
    step, start = (_spread(each, axis, group, tensor.shape[axis]) for each in (scale, zero))
    codes = ((tensor.float() - start) / torch.where(step > 0, step, 1.0)).round().clamp(0, most).to(torch.uint8)
    if together > 1:
        parts = codes.chunk(together, dim=-1)
        codes = parts[0]
        for number, part in enumerate(parts[1:], start=1):
            codes = codes | (part << (bits * number))
    return Quantised(codes, scale, zero, bits, group, by)


def dequantise(stored: Quantised, dtype: torch.dtype) -> Tensor:
    """The numbers [B, K, S, D] that codes stand for, computed in float32 and rounded to ``dtype``."""
    codes = stored.codes
    if stored.bits < 8:
        mask, shifts = (1 << stored.bits) - 1, range(0, 8, stored.bits)
        codes = torch.cat([(codes >> shift) & mask for shift in shifts], dim=-1)
    axis = 2 if stored.by == "channel" else 3
    step, start = (_spread(each, axis, stored.group, codes.shape[axis]) for each in (stored.scale, stored.zero))
    return (codes.float() * step + start).to(dtype)


def attend_quantised(
    query: Tensor,
    keys: Quantised,
    values: Quantised,
    position: Tensor,
    formula: Formula,
) -> tuple[Tensor, Tensor]:
    """Attention of one query a row over stored keys and values; here they are dequantised first.

    Shapes: query [B, K, G, D], position [B, K, S], -1 where a slot is empty. Returns what ``parts.attend_part`` does.
    """
    opened_keys, opened_values = (dequantise(stored, query.dtype) for stored in (keys, values))
    return attend_part(query, opened_keys, opened_values, position < 0, formula)


def _extremes(numbers: Tensor, axis: int, group: int) -> tuple[Tensor, Tensor]:
    """Least and greatest number of each group along ``axis``; the last group may be short."""
    missing = -numbers.shape[axis] % group
    pad = [0, 0] * (numbers.ndim - 1 - axis) + [0, missing]

    def grouped(filler: float) -> Tensor:
        return F.pad(numbers, pad, value=filler).unflatten(axis, (-1, group))

    return grouped(float("inf")).amin(axis + 1), grouped(float("-inf")).amax(axis + 1)


def _spread(each: Tensor, axis: int, group: int, length: int) -> Tensor:
    """A group's number for each of its members, float32."""
    return each.float().repeat_interleave(group, dim=axis).narrow(axis, 0, length)
