"""One generated step, first kernel: the newest token enters, and each split of the slots is attended to.

Split-K flash decoding over the slot buffers: a program takes one KV head of one row and a stretch of its slots, keeps
the G query heads as rows of its products, and leaves (m, l, acc) of its stretch for ``combine`` (kernels/policy.py).
Whatever a scorer reads leaves the same launch: the logits of the ranked pools, and, in programs of their own, the page
bounds. The new key and value lie in no slot yet while others read: the program that owns their slot puts them there and
computes with what it was given.

Shapes as everywhere: B rows, K KV heads, G = Q / K, S slots, U units, D head size; a *cell* is one (row, KV head).
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def newest_unit(ring, opened, row, cell, UNITS: tl.constexpr):
    """The unit last taken from a ring, as ``LayerState.newest_unit``."""
    last = (tl.load(opened + row) - 1 + UNITS) % UNITS
    return tl.load(ring + cell * UNITS + last)


@triton.jit
def mix(before, number):
    """One link of splitmix64, as ``scorers.place._mix``, on unsigned numbers."""
    z = before ^ (number + 0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def drawn_number(seeded, layer, head, position):
    """The number in [0, 1) that a token draws at entry; ``seeded`` is the first link, ``mix(0, seed)``."""
    mixed = mix(seeded, layer.to(tl.uint64))
    mixed = mix(mixed, head.to(tl.uint64))
    mixed = mix(mixed, position.to(tl.uint64))
    return (mixed >> 40).to(tl.int64).to(tl.float32) / (1 << 24)


@triton.jit
def enter(
    key, value, keys, values, position, ordinal, high, low, memory, drawn,
    new_slot, unit, inside, opens, place, clock_ordinal, t, layer, row, cell,
    K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, UNITS: tl.constexpr, STARTS: tl.constexpr, SEEDED: tl.constexpr,
):  # fmt: skip
    """Write the newest token, and what its unit forgets or learns at entry. One program of a cell does this."""
    d = tl.arange(0, DP)
    real = d < D
    new_key = tl.load(key + cell * D + d, mask=real, other=0.0)
    where = (cell.to(tl.int64) * S + new_slot) * D + d
    tl.store(keys + where, new_key, mask=real)
    tl.store(values + where, tl.load(value + cell * D + d, mask=real, other=0.0), mask=real)
    tl.store(position + cell.to(tl.int64) * S + new_slot, place)
    if ordinal is not None:
        tl.store(ordinal + cell.to(tl.int64) * (UNITS * PAGE) + inside, tl.load(clock_ordinal + row))
    if high is not None:
        box = (cell.to(tl.int64) * UNITS + unit) * D + d
        wide_key = new_key.to(tl.float32)
        most = tl.maximum(tl.load(high + box, real, 0.0).to(tl.float32), wide_key)
        least = tl.minimum(tl.load(low + box, real, 0.0).to(tl.float32), wide_key)
        tl.store(high + box, tl.where(opens, wide_key, most).to(high.dtype.element_ty), mask=real)
        tl.store(low + box, tl.where(opens, wide_key, least).to(low.dtype.element_ty), mask=real)
    if opens:
        if STARTS == "clock":
            tl.store(memory + cell * UNITS + unit, tl.load(t + row).to(tl.int32))
        elif STARTS == "zero":
            tl.store(memory + cell * UNITS + unit, 0.0)
        if drawn is not None:
            seeded = tl.full((), SEEDED, tl.uint64)
            tl.store(drawn + cell * UNITS + unit, drawn_number(seeded, tl.load(layer), cell % K, place))


@triton.jit
def page_bounds(
    query, new_key, high, low, bounds, newest, opens, scaling, cell, block,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    UNITS: tl.constexpr, START: tl.constexpr, TOTAL: tl.constexpr, HEADS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Bounds of one block of a pool's pages, heads reduced: sum_d max(q_d high_d, q_d low_d) as two products.

    The newest page is widened here as ``enter`` widens it in memory at the same time: doing it twice does no harm.
    """
    u, d, g = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP), tl.arange(0, GP)
    real = (u < UNITS)[None, :] & (d < D)[:, None]
    box = (cell.to(tl.int64) * UNITS + u)[None, :] * D + d[:, None]
    hi = tl.load(high + box, mask=real, other=0.0).to(tl.float32)
    lo = tl.load(low + box, mask=real, other=0.0).to(tl.float32)
    if newest is not None:
        fresh = new_key.to(tl.float32)[:, None]
        hi = tl.where((u == newest)[None, :], tl.where(opens, fresh, tl.maximum(hi, fresh)), hi)
        lo = tl.where((u == newest)[None, :], tl.where(opens, fresh, tl.minimum(lo, fresh)), lo)
    heads = (g < G)[:, None] & (d < D)[None, :]
    q = tl.load(query + (cell * G + g)[:, None] * D + d[None, :], mask=heads, other=0.0).to(tl.float32)
    bound = tl.dot(tl.maximum(q, 0.0).to(DOT), hi.to(DOT), input_precision="ieee")
    bound = tl.dot(tl.minimum(q, 0.0).to(DOT), lo.to(DOT), acc=bound, input_precision="ieee") * scaling
    if HEADS == "max":
        reduced = tl.max(tl.where((g < G)[:, None], bound, NOTHING), axis=0)
    else:
        reduced = tl.sum(tl.where((g < G)[:, None], bound, 0.0), axis=0)
        if HEADS == "mean":
            reduced = reduced / G
    tl.store(bounds + cell * TOTAL + START + u, reduced, mask=u < UNITS)


@triton.jit
def attend(
    query, key, value, keys, values, position, part_m, part_l, part_acc, logits, new_slot, scaling, cell, number,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, SPLIT_P: tl.constexpr,
    ADMITS: tl.constexpr, SPAN_START: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Softmax and weighted values over the ``SPLIT`` slots of one split; nothing where none of them is resident."""
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    heads = (g < G)[:, None] & (d < D)[None, :]
    rows = (cell * G + g)[:, None] * D + d[None, :]
    q = tl.load(query + rows, mask=heads, other=0.0).to(DOT)
    base, start = cell.to(tl.int64) * S, number * SPLIT
    own_keys, own_values = keys + base * D, values + base * D  # within a cell 32 bits reach every number
    span = tl.arange(0, SPLIT_P)
    inside = (span < SPLIT) & (start + span < S)
    held = tl.load(position + base + start + span, mask=inside, other=-1) >= 0
    if ADMITS:
        new_key = tl.load(key + cell * D + d, mask=d < D, other=0.0)
        new_value = tl.load(value + cell * D + d, mask=d < D, other=0.0)
        held = held | (start + span == new_slot)
    first = tl.min(tl.where(held, span, SPLIT)) // BLOCK  # blocks before the first resident and behind the last one
    end = (tl.max(tl.where(held, span + 1, 0)) + BLOCK - 1) // BLOCK  # are not read
    if logits is not None:
        own_logits = logits + cell.to(tl.int64) * (G * SPAN)
    m = tl.full((GP,), NOTHING, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, DP), tl.float32)
    for block in range(first, end):
        s = start + block * BLOCK + tl.arange(0, BLOCK)
        resident = tl.load(position + base + s, mask=s < S, other=-1) >= 0
        if ADMITS:
            resident = resident | (s == new_slot)
        k = tl.load(own_keys + s[None, :] * D + d[:, None], mask=resident[None, :] & (d < D)[:, None], other=0.0)
        if ADMITS:
            k = tl.where((s == new_slot)[None, :], new_key[:, None], k)
        x = tl.dot(q, k.to(DOT), input_precision="ieee") * scaling
        x = tl.where(resident[None, :], x, NOTHING)
        if logits is not None:
            ranked = (s >= SPAN_START) & (s < SPAN_START + SPAN)
            there = g[:, None] * SPAN + (s - SPAN_START)[None, :]
            tl.store(own_logits + there, x, mask=ranked[None, :] & (g < G)[:, None])
        most = tl.maximum(m, tl.max(x, axis=1))
        calm = tl.where(most == NOTHING, 0.0, most)  # -inf - -inf is not a number
        p, fade = tl.exp(x - calm[:, None]), tl.exp(m - calm)
        v = tl.load(own_values + s[:, None] * D + d[None, :], mask=resident[:, None] & (d < D)[None, :], other=0.0)
        if ADMITS:
            v = tl.where((s == new_slot)[:, None], new_value[None, :], v)
        total = total * fade + tl.sum(p, axis=1)
        acc = tl.dot(p.to(DOT), v.to(DOT), acc=acc * fade[:, None], input_precision="ieee")
        m = most
    part = (cell * SPLITS + number) * G + g
    tl.store(part_m + part, m, mask=g < G)
    tl.store(part_l + part, total, mask=g < G)
    tl.store(part_acc + part[:, None] * D + d[None, :], acc, mask=heads)


@triton.jit
def split(
    query, key, value, keys, values, position, part_m, part_l, part_acc, logits, bounds,
    ring, opened, fill, clock_position, clock_ordinal, t, layer, ordinal, high, low, memory, drawn, highs, lows,
    scaling,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, SPLIT_P: tl.constexpr,
    ADMITS: tl.constexpr, OFFSET: tl.constexpr, PAGE: tl.constexpr, UNITS: tl.constexpr, STARTS: tl.constexpr,
    SEEDED: tl.constexpr, SPAN_START: tl.constexpr, SPAN: tl.constexpr,
    BOXES: tl.constexpr, BLOCK_U: tl.constexpr, TOTAL: tl.constexpr, HEADS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (B * K, SPLITS + blocks of ``BOXES``).

    query [B, Q, D], key and value [B, K, D] contiguous; part_m and part_l [B, K, SPLITS, G] and part_acc
    [B, K, SPLITS, G, D] float32; logits [B, K, G, SPAN] of the slots from SPAN_START, written where a block holds any
    resident; bounds [B, K, TOTAL]. With ``ADMITS`` the newest token enters the pool that lies at OFFSET (UNITS units of
    PAGE slots). ``BOXES`` are the pools whose bounds are wanted: (first unit among all ranked, units, first block,
    whether the newest token is theirs), with ``highs`` and ``lows`` [B, K, U, D] in the same order.
    """
    cell, number = tl.program_id(0), tl.program_id(1)
    row = cell // K
    new_slot, unit = -1, 0
    opens = True
    if ADMITS:
        unit = newest_unit(ring, opened, row, cell, UNITS)
        filled = tl.load(fill + row).to(tl.int32) if PAGE > 1 else 1
        inside = unit * PAGE + filled - 1
        new_slot = OFFSET + inside
        opens = filled == 1
    if number < SPLITS:
        attend(
            query, key, value, keys, values, position, part_m, part_l, part_acc, logits, new_slot, scaling, cell,
            number, G, D, S, GP, DP, BLOCK, SPLITS, SPLIT, SPLIT_P, ADMITS, SPAN_START, SPAN, DOT,
        )  # fmt: skip
        if ADMITS:  # noqa: SIM102
            # (The outer question is settled when the kernel is compiled.)
            if (new_slot >= number * SPLIT) & (new_slot < (number + 1) * SPLIT):
                place = tl.load(clock_position + row)
                enter(
                    key, value, keys, values, position, ordinal, high, low, memory, drawn, new_slot, unit, inside,
                    opens, place, clock_ordinal, t, layer, row, cell, K, D, S, DP, PAGE, UNITS, STARTS, SEEDED,
                )  # fmt: skip
    for i in tl.static_range(len(BOXES)):
        block = number - SPLITS - BOXES[i][2]
        if (block >= 0) & (block < (BOXES[i][1] + BLOCK_U - 1) // BLOCK_U):
            d = tl.arange(0, DP)
            new_key = tl.load(key + cell * D + d, mask=d < D, other=0.0)
            page_bounds(
                query, new_key, highs[i], lows[i], bounds, unit if BOXES[i][3] else None, opens, scaling, cell, block,
                G, D, GP, DP, BLOCK_U, BOXES[i][1], BOXES[i][0], TOTAL, HEADS, DOT,
            )  # fmt: skip
