"""Decode attention over keys and values in 8 or 4 bits; they become numbers in registers, and nowhere else.

``attention.quantised`` says how they are stored. With 4 bits a byte holds a channel of each half of the head, so a tile
of bytes is two tiles of numbers, multiplied by the two halves of the query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy.attention.kernels import parts
from kvpolicy.attention.kernels.examples import Example
from kvpolicy.attention.kernels.parts import LOG2E, fold_logits, load_query, store_mixed, store_sums
from kvpolicy.attention.kernels.tiles import PRECISION, dot_dtype, power_of_2, tile_side
from kvpolicy.attention.quantised import Quantised


@triton.jit
def _numbers(
    codes, scale, zero, pair, slots, slot, there, FROM: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
    SIZE: tl.constexpr, GROUPED: tl.constexpr, BY_CHANNEL: tl.constexpr, TOGETHER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What the codes [TOKENS, WIDE] of the channels from ``FROM`` stand for; 0 where ``there`` does not hold.

    ``TOGETHER``: the slots of a tile are of one group, so a channel's scale is read once.
    """
    channel = tl.arange(0, WIDE)
    held = channel < CHANNELS
    if BY_CHANNEL:
        groups = (slots + GROUPED - 1) // GROUPED
        if TOGETHER:
            group = tl.min(slot // GROUPED, axis=0)
            at = (pair * groups + group) * SIZE + FROM + channel
            step = tl.load(scale + at, held, other=0.0)[None, :]
            start = tl.load(zero + at, held, other=0.0)[None, :]
        else:
            at = (pair * groups + slot[:, None] // GROUPED) * SIZE + FROM + channel[None, :]
            step = tl.load(scale + at, there[:, None] & held[None, :], other=0.0)
            start = tl.load(zero + at, there[:, None] & held[None, :], other=0.0)
    else:
        at = (pair * slots + slot[:, None]) * ((SIZE + GROUPED - 1) // GROUPED) + (FROM + channel[None, :]) // GROUPED
        step = tl.load(scale + at, there[:, None] & held[None, :], other=0.0)
        start = tl.load(zero + at, there[:, None] & held[None, :], other=0.0)
    numbers = codes.to(tl.float32) * step.to(tl.float32) + start.to(tl.float32)
    return tl.where(there[:, None] & held[None, :], numbers, 0.0).to(DOT)


@triton.jit
def _attend_quantised(
    query, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, position, out, log_sums,
    scaling, slots, length,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, STORED: tl.constexpr, WIDE: tl.constexpr,
    BITS: tl.constexpr, GROUPED: tl.constexpr, KEYS_BY_CHANNEL: tl.constexpr, VALUES_BY_CHANNEL: tl.constexpr,
    TOGETHER: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid: rows times KV heads; parts of ``length`` slots. ``STORED`` bytes hold the codes of a slot."""
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    byte = tl.arange(0, WIDE)
    heads = load_query(query, pair, GROUP, HEADS, SIZE, 0, STORED, WIDE, DOT)
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, WIDE], tl.float32)
    if BITS == 4:
        upper_heads = load_query(query, pair, GROUP, HEADS, SIZE, STORED, STORED, WIDE, DOT)
        upper_mixed = tl.zeros([HEADS, WIDE], tl.float32)
    for start in range(part * length, tl.minimum(part * length + length, slots), TOKENS):
        slot = start + tl.arange(0, TOKENS)
        there = tl.load(position + pair * slots + slot, slot < slots, other=-1) >= 0
        at = (pair * slots + slot[:, None]) * STORED + byte[None, :]
        code = tl.load(key_codes + at, there[:, None] & (byte < STORED)[None, :], other=0)
        lower = code & 15 if BITS == 4 else code
        key = _numbers(
            lower, key_scale, key_zero, pair, slots, slot, there, 0, STORED, WIDE,
            SIZE, GROUPED, KEYS_BY_CHANNEL, TOGETHER, DOT,
        )  # fmt: skip
        logits = tl.dot(heads, tl.trans(key), input_precision=PRECISION)
        if BITS == 4:
            key = _numbers(
                code >> 4, key_scale, key_zero, pair, slots, slot, there, STORED, STORED, WIDE,
                SIZE, GROUPED, KEYS_BY_CHANNEL, TOGETHER, DOT,
            )  # fmt: skip
            logits = tl.dot(upper_heads, tl.trans(key), acc=logits, input_precision=PRECISION)
        logits = tl.where(there[None, :], logits * (scaling * LOG2E), float("-inf"))
        shares, fade, highest, total = fold_logits(logits, highest, total)
        code = tl.load(value_codes + at, there[:, None] & (byte < STORED)[None, :], other=0)
        lower = code & 15 if BITS == 4 else code
        value = _numbers(
            lower, value_scale, value_zero, pair, slots, slot, there, 0, STORED, WIDE,
            SIZE, GROUPED, VALUES_BY_CHANNEL, TOGETHER, DOT,
        )  # fmt: skip
        mixed = tl.dot(shares.to(DOT), value, acc=mixed * fade[:, None], input_precision=PRECISION)
        if BITS == 4:
            value = _numbers(
                code >> 4, value_scale, value_zero, pair, slots, slot, there, STORED, STORED, WIDE,
                SIZE, GROUPED, VALUES_BY_CHANNEL, TOGETHER, DOT,
            )  # fmt: skip
            upper_mixed = tl.dot(shares.to(DOT), value, acc=upper_mixed * fade[:, None], input_precision=PRECISION)
    pairs = tl.num_programs(0)
    store_sums(log_sums, highest, total, part, pair, pairs, GROUP, HEADS)
    store_mixed(out, mixed, total, part, pair, pairs, GROUP, HEADS, SIZE, 0, STORED, WIDE)
    if BITS == 4:
        store_mixed(out, upper_mixed, total, part, pair, pairs, GROUP, HEADS, SIZE, STORED, STORED, WIDE)


def launch(
    query: Tensor, keys: Quantised, values: Quantised, position: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """What ``attention.quantised.attend_quantised`` computes; keys and values have the same bits and groups."""
    rows, kv_heads, slots = position.shape
    count, length = parts.count_parts(slots)
    outputs, log_sums = parts.part_buffers(query, count)
    stored = (tensor.contiguous() for each in (keys, values) for tensor in (each.codes, each.scale, each.zero))
    _attend_quantised[(rows * kv_heads, count)](
        query.contiguous(), *stored, position.contiguous(), outputs, log_sums, scaling, slots, length,
        **parts.head_sizes(query), **_storage(query, keys.bits, keys.group),
        KEYS_BY_CHANNEL=keys.by == "channel", VALUES_BY_CHANNEL=values.by == "channel",
        DOT=dot_dtype(_attend_quantised, query),
    )  # fmt: skip
    return parts.put_together(outputs, log_sums, query.dtype)


def _storage(query: Tensor, bits: int, group: int) -> dict[str, Any]:
    stored = query.shape[-1] * bits // 8
    side = tile_side(stored, query.element_size())
    tile = {"WIDE": max(16, power_of_2(stored)), "TOKENS": side, "TOGETHER": group % side == 0}
    return {"STORED": stored, "BITS": bits, "GROUPED": group, **tile}


def examples() -> Iterator[Example]:
    """Both widths, groups of a tile and of less, by channel and by token, odd head sizes."""
    for size, group, bits, grouped, dtype, dot, ways in (
        (128, 4, 8, 64, torch.bfloat16, tl.bfloat16, (True, False)),
        (128, 4, 4, 64, torch.bfloat16, tl.bfloat16, (True, False)),
        (80, 1, 4, 32, torch.float16, tl.float16, (False, True)),
        (256, 8, 8, 32, torch.float32, tl.float32, (True, False)),
    ):
        tensors = {
            **dict.fromkeys(("key_codes", "value_codes"), torch.uint8),
            **dict.fromkeys(("key_scale", "key_zero", "value_scale", "value_zero"), torch.float16),
            **dict.fromkeys(("out", "log_sums"), torch.float32),
            "query": dtype,
            "position": torch.int32,
        }
        query = torch.empty(1, 1, group, size, dtype=dtype, device="meta")
        by = dict(zip(("KEYS_BY_CHANNEL", "VALUES_BY_CHANNEL"), ways, strict=True))
        numbers = {"scaling": float, "slots": int, "length": int, "DOT": dot}
        sizes = {**parts.head_sizes(query), **_storage(query, bits, grouped)}
        yield Example(_attend_quantised, {**tensors, **numbers, **sizes, **by})
