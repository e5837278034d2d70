"""What decode kernels that read in another way share: slots cut into parts, the online softmax, and putting together.

How many parts depends on the number of slots alone, so that a row's output is the same bits in every batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy.attention.kernels.examples import Example
from kvpolicy.attention.kernels.tiles import power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

SLOTS_OF_A_PART = 256
MOST_PARTS = 64


@triton.jit
def load_query(query, pair, GROUP: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, FROM: tl.constexpr,
               CHANNELS: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Channels ``FROM`` ... ``FROM + CHANNELS`` of the query heads of a KV head, [HEADS, WIDE]."""
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, WIDE)
    at = query + (pair.to(tl.int64) * GROUP + head[:, None]) * SIZE + FROM + channel[None, :]
    return tl.load(at, (head < GROUP)[:, None] & (channel < CHANNELS)[None, :], other=0.0).to(DOT)


@triton.jit
def fold_logits(logits, highest, total):
    """A tile of base-2 logits [HEADS, TOKENS] into the running softmax: shares, what older shares shrink by, state."""
    higher = tl.maximum(highest, tl.max(logits, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is not a number
    shares = tl.exp2(logits - base[:, None])
    fade = tl.exp2(highest - base)
    return shares, fade, higher, total * fade + tl.sum(shares, axis=1)


@triton.jit
def log_of_sum(highest, total):
    """The natural log-sum-exp of base-2 logits; -inf where there were none."""
    return tl.where(total > 0, (highest + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf"))


@triton.jit
def store_sums(log_sums, highest, total, part, pair, pairs, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """The log-sum-exp of a part, [parts, B * K, GROUP]."""
    head = tl.arange(0, HEADS)
    tl.store(log_sums + (part * pairs + pair).to(tl.int64) * GROUP + head, log_of_sum(highest, total), head < GROUP)


@triton.jit
def store_mixed(out, mixed, total, part, pair, pairs, GROUP: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
                FROM: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The output of a part, [parts, B * K, GROUP, SIZE]; 0 where it saw nothing."""
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, WIDE)
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    line = (part * pairs + pair).to(tl.int64) * GROUP + head
    at = out + line[:, None] * SIZE + FROM + channel[None, :]
    tl.store(at, mixed, (head < GROUP)[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def _put_together(
    parts, log_sums, out, log_sum, count, lines, SIZE: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr
):
    """One part from ``count``. Grid: rows times query heads, ``lines``."""
    line = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    channel = tl.arange(0, WIDE)
    sums = tl.load(log_sums + part.to(tl.int64) * lines + line, part < count, other=float("-inf")) * LOG2E
    highest = tl.max(sums, axis=0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(sums - base)
    total = tl.sum(weights, axis=0)
    at = parts + (part[:, None].to(tl.int64) * lines + line) * SIZE + channel[None, :]
    outputs = tl.load(at, (part < count)[:, None] & (channel < SIZE)[None, :], other=0.0)
    mixed = tl.sum(outputs * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + line * SIZE + channel, mixed, channel < SIZE)
    tl.store(
        log_sum + line, tl.where(total > 0, (base + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf"))
    )


def count_parts(slots: int) -> tuple[int, int]:
    """In how many parts ``slots`` slots are read, and the slots of one: whole tiles, of whichever size."""
    wanted = min(MOST_PARTS, max(1, triton.cdiv(slots, SLOTS_OF_A_PART)))
    length = 64 * max(1, triton.cdiv(triton.cdiv(slots, wanted), 64))
    return max(1, triton.cdiv(slots, length)), length


def part_buffers(query: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps of each part; a single part is the output already."""
    dtype = query.dtype if parts == 1 else torch.float32
    outputs = query.new_empty((parts, *query.shape), dtype=dtype)
    return outputs, query.new_empty((parts, *query.shape[:3]), dtype=torch.float32)


def put_together(outputs: Tensor, log_sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output [B, K, G, D] of ``dtype`` and log-sum-exp [B, K, G] from those of each part."""
    count, size = outputs.shape[0], outputs.shape[-1]
    if count == 1:
        return outputs[0], log_sums[0]
    out = outputs.new_empty(outputs.shape[1:], dtype=dtype)
    log_sum = torch.empty_like(log_sums[0])
    _put_together[(log_sum.numel(),)](
        outputs, log_sums, out, log_sum, count, log_sum.numel(), SIZE=size, WIDE=power_of_2(size),
        PARTS=power_of_2(count),
    )  # fmt: skip
    return out, log_sum


def head_sizes(query: Tensor) -> dict[str, int]:
    """The sizes of a tile of query heads; 16 at least, as tensor cores take them."""
    group, size = query.shape[2:]
    return {"GROUP": group, "HEADS": max(16, power_of_2(group)), "SIZE": size}


def examples() -> Iterator[Example]:
    """The greatest number of parts, and a head size that is no power of two."""
    for size, parts, dtype in ((128, MOST_PARTS, torch.bfloat16), (80, 8, torch.float32)):
        arguments: dict[str, Any] = {"count": int, "lines": int, "SIZE": size, "WIDE": power_of_2(size), "PARTS": parts}
        tensors = dict.fromkeys(("parts", "log_sums", "log_sum"), torch.float32)
        yield Example(_put_together, {**tensors, "out": dtype, **arguments})
