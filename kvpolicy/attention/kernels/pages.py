"""Decode attention over selected pages, read from the slot buffer through an index: nothing is gathered first."""

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


@triton.jit
def _attend_pages(
    query, keys, values, position, index, out, log_sums,
    scaling, kv_heads, slots, pages, length,
    key_row, key_head, key_slot, value_row, value_head, value_slot,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    PAGE: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid: rows times KV heads; parts of ``length`` tokens of the named pages, one page after the other."""
    pair = tl.program_id(0)
    part = tl.program_id(1)
    row = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64)
    channel = tl.arange(0, WIDE)
    heads = load_query(query, pair, GROUP, HEADS, SIZE, 0, SIZE, WIDE, DOT)
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, WIDE], tl.float32)
    for start in range(part * length, tl.minimum(part * length + length, pages * PAGE), TOKENS):
        token = start + tl.arange(0, TOKENS)
        page = tl.load(index + pair.to(tl.int64) * pages + token // PAGE, token < pages * PAGE, other=-1)
        slot = page.to(tl.int64) * PAGE + token % PAGE
        there = (page >= 0) & (slot < slots)
        placed = tl.load(position + pair.to(tl.int64) * slots + slot, there, other=-1)
        at = keys + row * key_row + head * key_head + slot[None, :] * key_slot + channel[:, None]
        key = tl.load(at, there[None, :] & (channel < SIZE)[:, None], other=0.0)
        logits = tl.dot(heads, key.to(DOT), input_precision=PRECISION) * (scaling * LOG2E)
        logits = tl.where((placed >= 0)[None, :], logits, float("-inf"))
        shares, fade, highest, total = fold_logits(logits, highest, total)
        at = values + row * value_row + head * value_head + slot[:, None] * value_slot + channel[None, :]
        value = tl.load(at, there[:, None] & (channel < SIZE)[None, :], other=0.0)
        mixed = tl.dot(shares.to(DOT), value.to(DOT), acc=mixed * fade[:, None], input_precision=PRECISION)
    pairs = tl.num_programs(0)
    store_sums(log_sums, highest, total, part, pair, pairs, GROUP, HEADS)
    store_mixed(out, mixed, total, part, pair, pairs, GROUP, HEADS, SIZE, 0, SIZE, WIDE)


def launch(
    query: Tensor, keys: Tensor, values: Tensor, position: Tensor, index: Tensor, page: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """What ``attention.paged.attend_pages`` computes; shapes and arguments are its own."""
    rows, kv_heads, slots = position.shape
    keys, values = (each if each.stride(-1) == 1 else each.contiguous() for each in (keys, values))
    count, length = parts.count_parts(index.shape[2] * page)
    outputs, log_sums = parts.part_buffers(query, count)
    _attend_pages[(rows * kv_heads, count)](
        query.contiguous(), keys, values, position.contiguous(), index.contiguous(), outputs, log_sums,
        scaling, kv_heads, slots, index.shape[2], length, *keys.stride()[:3], *values.stride()[:3],
        **parts.head_sizes(query), WIDE=max(16, power_of_2(query.shape[-1])), PAGE=page,
        TOKENS=tile_side(query.shape[-1], query.element_size()), DOT=dot_dtype(_attend_pages, query),
    )  # fmt: skip
    return parts.put_together(outputs, log_sums, query.dtype)


def examples() -> Iterator[Example]:
    """One part and several, a page that is no power of two, heads alone and in groups."""
    numbers = ("kv_heads", "slots", "pages", "length")
    strides = tuple(f"{tensor}_{side}" for tensor in ("key", "value") for side in ("row", "head", "slot"))
    for size, group, page, dtype, dot, out in (
        (128, 4, 16, torch.bfloat16, tl.bfloat16, torch.float32),
        (80, 1, 5, torch.float16, tl.float16, torch.float16),
        (256, 3, 16, torch.float32, tl.float32, torch.float32),
    ):
        tensors = dict.fromkeys(("query", "keys", "values"), dtype)
        arguments: dict[str, Any] = {**dict.fromkeys(numbers, int), "scaling": float, "position": torch.int32}
        arguments |= dict.fromkeys(strides, size)
        sizes = parts.head_sizes(torch.empty(1, 1, group, size, device="meta"))
        constants = {**sizes, "WIDE": power_of_2(size), "PAGE": page, "DOT": dot}
        constants["TOKENS"] = tile_side(size, dtype.itemsize)
        results = {"index": torch.int32, "out": out, "log_sums": torch.float32}
        yield Example(_attend_pages, {**tensors, **arguments, **results, **constants})
