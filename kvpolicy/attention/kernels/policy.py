"""One generated step, second kernel: the splits become one, and the policy observes and decides.

Steps 4 and 5 of ``runtime/token_pass.py`` for one pool, with the numbers, the total order and the ties of
``runtime/pool.py`` and ``runtime/evict.py``: equal scores give equal victims, bit for bit. One program holds a whole
row of units, so that nothing is added up in an order that could change from run to run.

Grid (B * K, 2 where there is a policy to run, else 1): the output and the decision need each other for nothing, so each
has a program of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvpolicy.attention.kernels.decode import NOTHING, newest_unit

LAST_KEY = tl.constexpr(2**63 - 1)
FIRST_KEY = tl.constexpr(-(2**63))


@triton.jit
def order_keys(score, place):
    """``runtime.pool.order_keys``: bits of a float32 that compare like integers, then the position."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + place.to(tl.int64)


@triton.jit
def kth_greatest(keys, k, BITS: tl.constexpr):
    """The k-th greatest of int64 ``keys`` [N], k >= 1: found by its bits from the top, BITS of them at a time.

    At every step all 2^BITS continuations of the prefix are tried at once; the greatest that at least k keys reach is
    right. Counts are integers, so the result is exact and always the same.
    """
    unsigned = keys.to(tl.uint64, bitcast=True) ^ (1 << 63)
    digits = tl.arange(0, 1 << BITS).to(tl.uint64)
    prefix = tl.full((), 0, tl.uint64)
    for step in range(64 // BITS):
        shift = tl.full((), 64 - BITS - BITS * step, tl.uint64)
        tries = prefix | (digits << shift)
        reached = tl.sum((unsigned[None, :] >= tries[:, None]).to(tl.int32), axis=1)
        digit = tl.sum((reached >= k).to(tl.int32)) - 1  # 0 is always reached
        prefix = prefix | (digit.to(tl.uint64) << shift)
    return (prefix ^ (1 << 63)).to(tl.int64, bitcast=True)


@triton.jit
def merge(
    output, part_m, part_l, part_acc, cell,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, SPLITS_P: tl.constexpr,
):  # fmt: skip
    """The output of one cell from its splits; 0 where nothing is resident."""
    s, d = tl.arange(0, SPLITS_P), tl.arange(0, DP)
    for g in tl.static_range(G):
        part = (cell * SPLITS + s) * G + g
        m = tl.load(part_m + part, mask=s < SPLITS, other=NOTHING)
        most = tl.max(m)
        weight = tl.exp(m - tl.where(most == NOTHING, 0.0, most))
        total = tl.sum(weight * tl.load(part_l + part, mask=s < SPLITS, other=0.0))
        real = (s < SPLITS)[:, None] & (d < D)[None, :]
        acc = tl.load(part_acc + part[:, None] * D + d[None, :], mask=real, other=0.0)
        out = tl.sum(acc * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
        tl.store(output + (cell * G + g) * D + d, out.to(output.dtype.element_ty), mask=d < D)


@triton.jit
def token_scores(
    logits, part_m, part_l, slots, places, cell,
    SIGNAL: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr, SPLITS_P: tl.constexpr,
    SPAN_START: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """attention or attention-logit of each token [units, page], heads reduced; -inf where a slot is empty."""
    s = tl.arange(0, SPLITS_P)
    if HEADS == "max":
        score = tl.full(slots.shape, NOTHING, tl.float32)
    else:
        score = tl.zeros(slots.shape, tl.float32)
    for g in tl.static_range(G):
        there = (cell.to(tl.int64) * G + g) * SPAN + slots - SPAN_START
        x = tl.load(logits + there, mask=places >= 0, other=NOTHING)
        if SIGNAL == "attention":
            m = tl.load(part_m + (cell * SPLITS + s) * G + g, mask=s < SPLITS, other=NOTHING)
            most = tl.max(m)
            total = tl.sum(tl.exp(m - most) * tl.load(part_l + (cell * SPLITS + s) * G + g, mask=s < SPLITS, other=0.0))
            x = tl.exp(x - most) / total
        score = tl.maximum(score, x) if HEADS == "max" else score + x
    if HEADS == "mean":
        score = score / G
    return tl.where(places >= 0, score, NOTHING)


@triton.jit
def fold(old, score, now, KIND: tl.constexpr, VALUE: tl.constexpr):
    """``scorers.memory.fold``."""
    if KIND == "last-hit":
        folded = tl.where(score > 0, now.to(tl.int32), old)
    elif KIND == "sum":
        folded = old + score
    elif KIND == "decay":
        folded = old * VALUE + score
    else:
        folded = tl.maximum(old * VALUE, score)
    return folded


@triton.jit
def candidates(
    free, places, units, newest, ordinal, seen, reads, row, cell,
    PAGE: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """``PoolPolicy.candidates``: of the resident units ``free`` those that no window, pin or open page protects."""
    if WINDOW is not None or FIRST is not None:
        j = tl.arange(0, WIDTH)
        token = (units * PAGE)[:, None] + j[None, :]
        mask = free[:, None] & (j < PAGE)[None, :]
        order = tl.load(ordinal + cell.to(tl.int64) * (UNITS * PAGE) + token, mask=mask, other=0)
        safe = places < -1
        if WINDOW is not None:
            safe = safe | (order >= tl.load(seen + row) - WINDOW(reads, row, cell))
        if FIRST is not None:
            safe = safe | (order < FIRST(reads, row, cell))
        free = free & (tl.max((safe & (places >= 0)).to(tl.int32), axis=1) == 0)
    if PAGE > 1:
        free = free & (units != newest)
    return free


@triton.jit
def drop(
    score, place, free, units, slots, inside, position, ring, tail, peak, opened, t, reads, row, cell, base,
    PAGE: tl.constexpr, UNITS: tl.constexpr, BUDGET: tl.constexpr, CADENCE: tl.constexpr, MOST: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """``evict.drop_some``: the lowest-keyed candidates leave, their slots are empty, their units back in the ring.

    Which of the freed units comes first in the ring has no meaning; here they go in order of unit.
    """
    put_back = tl.load(tail + cell)
    count = UNITS - put_back + tl.load(opened + row)
    most_held = tl.maximum(tl.load(peak + cell), count * PAGE)
    budget = BUDGET(reads, row, cell)
    if PAGE == 1:
        excess = count - budget
    else:
        excess = (count * PAGE - budget + PAGE - 1) // PAGE  # rounded up or below 1
    if CADENCE > 1:
        excess = tl.where(tl.load(t + row) % CADENCE == 0, excess, 0)
    keys = tl.where(free, order_keys(score, place), LAST_KEY)
    if MOST == 1:
        gone = free & (keys == tl.min(keys)) & (excess > 0)
    else:
        leave = tl.minimum(tl.minimum(excess, MOST), tl.sum(free.to(tl.int32)).to(tl.int64))
        # The n-th lowest of keys is the n-th greatest of their complements.
        last = -1 - kth_greatest(-1 - keys, tl.maximum(leave, 1).to(tl.int32), BITS)
        gone = free & (keys <= last) & (leave > 0)
    many = gone.to(tl.int32)
    place_in_ring = (put_back + tl.cumsum(many) - many) % UNITS
    tl.debug_barrier()  # every thread has read what others now write
    tl.store(position + base + slots, tl.full(slots.shape, -1, tl.int32), mask=gone[:, None] & inside)
    tl.store(ring + cell * UNITS + place_in_ring, units.to(tl.int32), mask=gone)
    tl.store(tail + cell, put_back + tl.sum(many))
    tl.store(peak + cell, most_held)


@triton.jit
def decide(
    part_m, part_l, logits, bounds, position, ordinal, memory, drawn, ring, tail, peak, opened, seen, t, reads, row,
    cell,
    G: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr, SPLITS_P: tl.constexpr,
    SPAN_START: tl.constexpr, SPAN: tl.constexpr,
    RANKED: tl.constexpr, TOTAL: tl.constexpr, TOTAL_P: tl.constexpr, WIDTH: tl.constexpr,
    FROM: tl.constexpr, PAGE: tl.constexpr, UNITS: tl.constexpr,
    SIGNAL: tl.constexpr, HEADS: tl.constexpr, HIT: tl.constexpr, ABOVE: tl.constexpr, SHARE: tl.constexpr,
    MEMORY: tl.constexpr, FADE: tl.constexpr, WEIGHT: tl.constexpr, UPDATES: tl.constexpr,
    BUDGET: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr, CADENCE: tl.constexpr, MOST: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Observe, and on an update step drop. ``RANKED`` are the pools whose units compete for hits, as (first unit, page,
    first slot); the units of all of them stand in one line, and those of the working pool from ``FROM`` on."""
    base = cell.to(tl.int64) * S
    u, j = tl.arange(0, TOTAL_P), tl.arange(0, WIDTH)
    page, first_slot = tl.full((TOTAL_P,), 1, tl.int32), tl.zeros((TOTAL_P,), tl.int32)
    for i in tl.static_range(len(RANKED)):
        first_slot = tl.where(u >= RANKED[i][0], RANKED[i][2] + (u - RANKED[i][0]) * RANKED[i][1], first_slot)
        page = tl.where(u >= RANKED[i][0], RANKED[i][1], page)
    place = tl.load(position + base + first_slot, mask=u < TOTAL, other=-1)
    slots = first_slot[:, None] + j[None, :]
    inside = (u < TOTAL)[:, None] & (j[None, :] < page[:, None])
    places = tl.load(position + base + slots, mask=inside, other=-1)
    resident = place >= 0
    units = u - FROM
    mine = (units >= 0) & (units < UNITS)
    now = tl.load(t + row)
    newest = newest_unit(ring, opened, row, cell, UNITS)
    if SIGNAL == "page-bound":
        score = tl.load(bounds + cell * TOTAL + u, mask=resident, other=0.0)
    elif SIGNAL == "random":
        score = tl.load(drawn + cell * UNITS + units, mask=resident & mine, other=0.0)
    elif SIGNAL == "recency":
        score = tl.max(places, axis=1).to(tl.float32)
    else:
        score = tl.max(
            token_scores(
                logits, part_m, part_l, slots, places, cell, SIGNAL, HEADS, G, SPLITS, SPLITS_P, SPAN_START, SPAN
            ),
            axis=1,
        )
    score = tl.where(resident, score, 0.0)
    if HIT == "above":
        score = (score >= ABOVE).to(tl.float32)
    elif HIT == "top":
        count = tl.sum(resident.to(tl.int32)).to(tl.int64)
        winners = tl.minimum(tl.maximum(SHARE(reads, row, cell, count), 0), count)
        keys = tl.where(resident, order_keys(score, place), FIRST_KEY)
        least = kth_greatest(keys, tl.maximum(winners, 1).to(tl.int32), BITS)
        score = (resident & (keys >= least) & (winners > 0)).to(tl.float32)
    if MEMORY != "none":
        folded = fold(tl.load(memory + cell * UNITS + units, mask=mine, other=0), score, now, MEMORY, FADE)
        tl.debug_barrier()  # every thread has read what others now write
        tl.store(memory + cell * UNITS + units, folded, mask=mine)
        score = folded.to(tl.float32)
    if UPDATES:
        free = candidates(
            resident & mine, places, units, newest, ordinal, seen, reads, row, cell,
            PAGE, UNITS, WIDTH, WINDOW, FIRST,
        )  # fmt: skip
        drop(
            score * WEIGHT, place, free, units, slots, inside, position, ring, tail, peak, opened, t, reads, row, cell,
            base, PAGE, UNITS, BUDGET, CADENCE, MOST, BITS,
        )  # fmt: skip


@triton.jit
def combine(
    output, part_m, part_l, part_acc, logits, bounds, position, ordinal, memory, drawn, ring, tail, peak, opened, seen,
    t, reads,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_P: tl.constexpr, SPAN_START: tl.constexpr, SPAN: tl.constexpr,
    RANKED: tl.constexpr, TOTAL: tl.constexpr, TOTAL_P: tl.constexpr, WIDTH: tl.constexpr,
    FROM: tl.constexpr, PAGE: tl.constexpr, UNITS: tl.constexpr,
    SIGNAL: tl.constexpr, HEADS: tl.constexpr, HIT: tl.constexpr, ABOVE: tl.constexpr, SHARE: tl.constexpr,
    MEMORY: tl.constexpr, FADE: tl.constexpr, WEIGHT: tl.constexpr, UPDATES: tl.constexpr,
    BUDGET: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr, CADENCE: tl.constexpr, MOST: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Grid (B * K, 1), or (B * K, 2) where ``RANKED`` is not None. output [B, Q, D]; the rest as ``split`` left it.

    memory, drawn, ring, ordinal, tail and peak are those of the working pool, opened and seen those of its order of
    arrival; ``reads`` is what its quantities read (kernels/quantities.py).
    """
    cell = tl.program_id(0)
    if tl.program_id(1) == 0:
        merge(output, part_m, part_l, part_acc, cell, G, D, DP, SPLITS, SPLITS_P)
    elif RANKED is not None:
        decide(
            part_m, part_l, logits, bounds, position, ordinal, memory, drawn, ring, tail, peak, opened, seen, t, reads,
            cell // K, cell, G, S, SPLITS, SPLITS_P, SPAN_START, SPAN, RANKED, TOTAL, TOTAL_P, WIDTH, FROM, PAGE, UNITS,
            SIGNAL, HEADS, HIT, ABOVE, SHARE, MEMORY, FADE, WEIGHT, UPDATES, BUDGET, WINDOW, FIRST, CADENCE, MOST, BITS,
        )  # fmt: skip
