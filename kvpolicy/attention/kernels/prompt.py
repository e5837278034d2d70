"""Prompt scores without an N x S map: a kernel for each query's log-sum-exp, and one that sums the columns.

The column kernel holds a block of slots and walks over the queries that can see it, so what it adds up stays in
registers, each slot is written once, and the order of every sum is fixed. Blocks that causality hides are not read.
Position -1 means a padding query or an empty slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy.attention.kernels.examples import Example
from kvpolicy.attention.kernels.tiles import PRECISION, dot_dtype, power_of_2, tile_side

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN_POSITION = tl.constexpr(2**31 - 1)  # that of a block without tokens: no query reaches it

REACHES = 256  # blocks whose reach is read at once


@triton.jit
def _reached(reaches, count, bound, CHUNK: tl.constexpr):
    """The first block whose reach is at least ``bound``, and the one after the last such block."""
    first = count
    end = 0
    for start in range(0, count, CHUNK):
        block = start + tl.arange(0, CHUNK)
        reach = tl.load(reaches + block, block < count, other=-HIDDEN_POSITION)
        first = tl.minimum(first, tl.min(tl.where(reach >= bound, block, count)))
        end = tl.maximum(end, tl.max(tl.where(reach >= bound, block + 1, 0)))
    return first, end


@triton.jit
def _tile_queries(
    query, query_position, row, head, block, tokens,
    stride_row, stride_head, stride_token,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """A tile of queries [HEADS * TOKENS, WIDE], heads first, and each one's position, -1 for what is not there."""
    line = tl.arange(0, HEADS * TOKENS)
    member = line // TOKENS
    token = block * TOKENS + line % TOKENS
    there = (token < tokens) & (member < GROUP)
    position = tl.load(query_position + row * tokens + token, there, other=-1)
    channel = tl.arange(0, WIDE)
    at = (
        query
        + row * stride_row
        + (head * GROUP + member).to(tl.int64) * stride_head
        + token.to(tl.int64) * stride_token
    )
    tile = tl.load(at[:, None] + channel[None, :], there[:, None] & (channel < SIZE)[None, :], other=0.0)
    return tile.to(DOT), position, member, token


@triton.jit
def _tile_keys(
    keys, key_position, row, head, kv_heads, block, slots,
    stride_row, stride_head, stride_slot,
    SLOTS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of keys, channels first [WIDE, SLOTS], and each one's position, -1 for what is not there."""
    slot = block * SLOTS + tl.arange(0, SLOTS)
    position = tl.load(key_position + (row * kv_heads + head) * slots + slot, slot < slots, other=-1)
    channel = tl.arange(0, WIDE)
    at = keys + row * stride_row + head * stride_head + slot.to(tl.int64) * stride_slot
    tile = tl.load(at[None, :] + channel[:, None], (slot < slots)[None, :] & (channel < SIZE)[:, None], other=0.0)
    return tile.to(DOT), position, slot


@triton.jit
def _log_sums(
    query, keys, query_position, key_position, slot_reach, out,
    scaling, tokens, slots, kv_heads, slot_blocks,
    query_row, query_head, query_token, key_row, key_head, key_slot,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    SIZE: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
    HEADS_FIRST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a block of queries over one part of the slots it sees, -inf where it sees none.

    Grid: blocks of queries, the longest walks first; rows times KV heads; parts. ``out`` is [parts, B, K, G, N], or
    [parts, B, K, 1, N] where the maximum over heads comes before the softmax (``HEADS_FIRST``).
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    pair = tl.program_id(1)
    part = tl.program_id(2)
    row = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64)
    tile, position, member, token = _tile_queries(
        query, query_position, row, head, block, tokens, query_row, query_head, query_token,
        GROUP, HEADS, TOKENS, SIZE, WIDE, DOT,
    )  # fmt: skip
    first, end = _reached(slot_reach + pair * slot_blocks, slot_blocks, -tl.max(position), CHUNK)
    length = tl.cdiv(tl.maximum(end - first, 0), tl.num_programs(2))
    start = first + part * length
    stop = tl.minimum(start + length, end)
    LINES: tl.constexpr = TOKENS if HEADS_FIRST else HEADS * TOKENS
    highest = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    for index in range(start, stop):
        key, key_at, _slot = _tile_keys(
            keys, key_position, row, head, kv_heads, index, slots, key_row, key_head, key_slot, SLOTS, SIZE, WIDE, DOT
        )
        logits = tl.dot(tile, key, input_precision=PRECISION) * (scaling * LOG2E)
        seen = (key_at >= 0)[None, :] & (key_at[None, :] <= position[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        if HEADS_FIRST:
            logits = tl.max(tl.reshape(logits, [HEADS, TOKENS, SLOTS]), axis=0)
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        highest = higher
    known = total > 0
    result = tl.where(known, (highest + tl.log2(tl.where(known, total, 1.0))) * LN2, float("-inf"))
    lines = (part * tl.num_programs(1) + pair).to(tl.int64)
    if HEADS_FIRST:
        token = block * TOKENS + tl.arange(0, TOKENS)
        tl.store(out + lines * tokens + token, result, token < tokens)
    else:
        tl.store(out + (lines * GROUP + member) * tokens + token, result, (token < tokens) & (member < GROUP))


@triton.jit
def _column_sums(
    query, keys, query_position, key_position, query_reach, log_sums, out,
    scaling, tokens, slots, kv_heads, query_blocks,
    query_row, query_head, query_token, key_row, key_head, key_slot,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    SIZE: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
    SOFTMAX: tl.constexpr, REDUCE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums over queries for a block of slots. Grid: blocks of slots; rows times KV heads.

    ``log_sums`` is what ``_log_sums`` made, parts put together; not read for the sum of logits. ``out`` is [B, K, S],
    or [B, K, G, S] where ``REDUCE`` is "each".
    """
    block = tl.program_id(0)
    pair = tl.program_id(1)
    row = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64)
    key, key_at, slot = _tile_keys(
        keys, key_position, row, head, kv_heads, block, slots, key_row, key_head, key_slot, SLOTS, SIZE, WIDE, DOT
    )
    oldest = tl.min(tl.where(key_at >= 0, key_at, HIDDEN_POSITION))
    first, end = _reached(query_reach + row * query_blocks, query_blocks, oldest, CHUNK)
    LINES: tl.constexpr = 1 if REDUCE == "first" else HEADS
    total = tl.zeros([LINES, SLOTS], tl.float32)
    for index in range(first, end):
        tile, position, member, token = _tile_queries(
            query, query_position, row, head, index, tokens, query_row, query_head, query_token,
            GROUP, HEADS, TOKENS, SIZE, WIDE, DOT,
        )  # fmt: skip
        logits = tl.dot(tile, key, input_precision=PRECISION) * scaling
        seen = (key_at >= 0)[None, :] & (key_at[None, :] <= position[:, None])
        if SOFTMAX and REDUCE == "first":
            logits = tl.max(tl.reshape(tl.where(seen, logits, float("-inf")), [HEADS, TOKENS, SLOTS]), axis=0)
            token = index * TOKENS + tl.arange(0, TOKENS)
            known = tl.load(log_sums + pair.to(tl.int64) * tokens + token, token < tokens, other=float("-inf"))
            base = tl.where(
                known > float("-inf"), known, 0.0
            )  # a query without one sees nothing: all its logits are -inf
            total += tl.sum(tl.exp2((logits - base[:, None]) * LOG2E), axis=0)[None, :]
        else:
            if SOFTMAX:
                line = (pair.to(tl.int64) * GROUP + member) * tokens + token
                known = tl.load(log_sums + line, position >= 0, other=float("-inf"))
                base = tl.where(known > float("-inf"), known, 0.0)
                logits = tl.exp2(tl.where(seen, (logits - base[:, None]) * LOG2E, float("-inf")))
            else:
                logits = tl.where(seen, logits, 0.0)
            total += tl.sum(tl.reshape(logits, [HEADS, TOKENS, SLOTS]), axis=1)
    member = tl.arange(0, LINES)
    if REDUCE == "each":
        at = out + (pair.to(tl.int64) * GROUP + member[:, None]) * slots + slot[None, :]
        tl.store(at, total, (member < GROUP)[:, None] & (slot < slots)[None, :])
    else:
        if REDUCE == "max":
            result = tl.max(tl.where((member < GROUP)[:, None], total, float("-inf")), axis=0)
        elif REDUCE == "mean":
            result = tl.sum(total, axis=0) / GROUP
        else:
            result = tl.sum(total, axis=0)
        tl.store(out + pair.to(tl.int64) * slots + slot, result, slot < slots)


def launch(
    query: Tensor,
    keys: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    scaling: float,
    signal: str,
    heads: str,
) -> Tensor:
    """What ``attention.columns.prompt_scores`` computes; shapes and arguments are its own."""
    rows, kv_heads, slots = key_position.shape
    tokens = query.shape[2]
    query, keys = _channels_together(query), _channels_together(keys)
    query_position, key_position = query_position.contiguous(), key_position.contiguous()
    sizes = _sizes(query.shape[1] // kv_heads, query.shape[3], query.element_size())
    query_reach = _block_reach(query_position, sizes["TOKENS"], -1)
    nearest = torch.where(key_position < 0, HIDDEN_POSITION.value, key_position)
    slot_reach = _block_reach(-nearest, sizes["SLOTS"], -HIDDEN_POSITION.value)
    strides = (*query.stride()[:3], *keys.stride()[:3])
    first = signal == "attention" and heads == "logits-max"
    log_sums = None
    if signal == "attention":
        parts = _parts(query_reach.shape[-1], slot_reach.shape[-1])
        lines = 1 if first else sizes["GROUP"]
        log_sums = query.new_empty(parts, rows, kv_heads, lines, tokens, dtype=torch.float32)
        _log_sums[(query_reach.shape[-1], rows * kv_heads, parts)](
            query, keys, query_position, key_position, slot_reach, log_sums,
            scaling, tokens, slots, kv_heads, slot_reach.shape[-1], *strides,
            **sizes, DOT=dot_dtype(_log_sums, query), HEADS_FIRST=first, CHUNK=REACHES,
        )  # fmt: skip
        log_sums = log_sums[0] if parts == 1 else torch.logsumexp(log_sums, 0)
    each = heads == "each"
    out = query.new_empty(rows, kv_heads, sizes["GROUP"] if each else 1, slots, dtype=torch.float32)
    reduce = "first" if first else "max" if heads == "logits-max" else heads
    _column_sums[(slot_reach.shape[-1], rows * kv_heads)](
        query, keys, query_position, key_position, query_reach, log_sums, out,
        scaling, tokens, slots, kv_heads, query_reach.shape[-1], *strides,
        **sizes, DOT=dot_dtype(_column_sums, query), SOFTMAX=signal == "attention", REDUCE=reduce, CHUNK=REACHES,
    )  # fmt: skip
    return out


def _sizes(group: int, channels: int, itemsize: int) -> dict[str, int]:
    """A tile of queries has as many lines, heads times tokens, as a tile of keys has slots."""
    padded, side = power_of_2(group), tile_side(channels, itemsize)
    return {
        "GROUP": group,
        "HEADS": padded,
        "TOKENS": max(1, side // padded),
        "SLOTS": side,
        "SIZE": channels,
        "WIDE": max(16, power_of_2(channels)),
    }


def _parts(query_blocks: int, slot_blocks: int) -> int:
    """In how many parts one query block's walk is cut: more than one for a few queries over many slots.

    It asks nothing of the number of rows, so that a row's scores are the same bits in every batch.
    """
    return 1 if query_blocks >= 8 else min(32, triton.cdiv(slot_blocks, 8))


def _block_reach(reach: Tensor, size: int, nothing: int) -> Tensor:
    """The greatest number of each block of the last dimension, int32."""
    padded = torch.nn.functional.pad(reach, (0, -reach.shape[-1] % size), value=nothing)
    return padded.unflatten(-1, (-1, size)).amax(-1).to(torch.int32).contiguous()


def _channels_together(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def examples() -> Iterator[Example]:
    """Heads alone and in groups, sizes that are no power of two, every way to reduce, and each dtype."""
    for group, channels, dtype, dot, heads in (
        (4, 128, torch.bfloat16, tl.bfloat16, ("mean", "max", "first", "each", "sum", "logits")),
        (3, 80, torch.float16, tl.float16, ("first", "each")),
        (1, 64, torch.float32, tl.float32, ("mean",)),
        (8, 256, torch.float32, tl.float32, ("max",)),
    ):
        strides = ("query_row", "query_head", "query_token", "key_row", "key_head", "key_slot")
        shared: dict[str, Any] = {
            **dict.fromkeys(("tokens", "slots", "kv_heads"), int),
            **dict.fromkeys(strides, channels),
            **dict.fromkeys(("query", "keys"), dtype),
            **dict.fromkeys(("query_position", "key_position"), torch.int64),
            "scaling": float,
            "log_sums": torch.float32,
            "out": torch.float32,
            "DOT": dot,
            "CHUNK": REACHES,
            **_sizes(group, channels, dtype.itemsize),
        }
        for first in {reduce == "first" for reduce in heads}:
            parts = {"slot_reach": torch.int32, "slot_blocks": int, "HEADS_FIRST": first}
            yield Example(_log_sums, {**shared, **parts})
        for reduce in heads:
            softmax = reduce != "logits"
            columns = {"query_reach": torch.int32, "query_blocks": int, "SOFTMAX": softmax}
            if not softmax:
                columns |= {"log_sums": None}
            yield Example(_column_sums, {**shared, **columns, "REDUCE": reduce if softmax else "mean"})
