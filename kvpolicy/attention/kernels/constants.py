"""What the two decode kernels are specialised for: constants from a form, and how its slots are split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton

from kvpolicy.attention.kernels.form import Arrival, Form, Work
from kvpolicy.attention.kernels.quantities import count_function, share_function
from kvpolicy.attention.kernels.tiles import power_of_2

BLOCK_UNITS = 64  # pages whose bounds one program computes
LONGEST_SPLIT = 8192  # slots: a program looks at all positions of its split at once
PROGRAMS_PER_PROCESSOR = 2

Constants = dict[str, Any]


@dataclass(frozen=True)
class Splits:
    """``count`` stretches of ``length`` slots, each of whole blocks of ``block``."""

    block: int
    count: int
    length: int

    @classmethod
    def of(cls, cells: int, slots: int, head_dim: int, processors: int) -> Splits:
        """Enough programs to keep every multiprocessor busy, and no more: each split costs a line in the scratch."""
        block = 64 if head_dim <= 128 else 32
        blocks = -(-slots // block)
        wanted = max(1, PROGRAMS_PER_PROCESSOR * processors // cells)
        each = min(-(-blocks // wanted), LONGEST_SPLIT // block)
        return cls(block, -(-blocks // each), each * block)


def shape_constants(group: int, head_dim: int, slots: int, kv_heads: int) -> Constants:
    """What both kernels know of a layer's shape."""
    return {"K": kv_heads, "G": group, "D": head_dim, "S": slots, "DP": max(16, power_of_2(head_dim))}


def split_constants(splits: Splits, group: int, arrival: Arrival | None, work: Work | None) -> Constants:
    """What ``split`` is specialised for, beside the shape."""
    start, span = span_of(work) if work is not None else (0, 0)
    boxes, first, block = [], 0, 0
    for pool in work.ranked if work is not None and work.signal == "page-bound" else ():
        boxes.append((first, pool.units, block, pool.arrives))
        first, block = first + pool.units, block + -(-pool.units // BLOCK_UNITS)
    return {
        "GP": max(16, power_of_2(group)),
        "BLOCK": splits.block,
        "SPLITS": splits.count,
        "SPLIT": splits.length,
        "SPLIT_P": power_of_2(splits.length),
        "ADMITS": arrival is not None,
        "OFFSET": arrival.offset if arrival else 0,
        "PAGE": arrival.page if arrival else 1,
        "UNITS": arrival.units if arrival else 1,
        "STARTS": arrival.starts if arrival else "",
        "SEEDED": first_link(arrival.seed) if arrival and arrival.seed is not None else 0,
        "SPAN_START": start,
        "SPAN": span,
        "BOXES": tuple(boxes),
        "BLOCK_U": BLOCK_UNITS,
        "TOTAL": work.units if work is not None and boxes else 0,
        "HEADS": work.heads if work is not None and boxes else "mean",
    }


def combine_constants(splits: Splits, work: Work | None) -> Constants:
    """What ``combine`` is specialised for, beside the shape."""
    constants: Constants = {"SPLITS": splits.count, "SPLITS_P": power_of_2(splits.count), **_IDLE}
    if work is None:
        return constants
    own, (start, span), total = work.ranked[work.own], span_of(work), power_of_2(work.units)
    first_units = [sum(pool.units for pool in work.ranked[:i]) for i in range(len(work.ranked))]
    places = {name: (number, by_head) for number, (name, by_head) in enumerate(work.reads)}
    hit, threshold = work.hit or ("none", ())  # a number, or the tree of a share
    return constants | {
        "SPAN_START": start,
        "SPAN": span,
        "RANKED": tuple((first, pool.page, pool.offset) for first, pool in zip(first_units, work.ranked, strict=True)),
        "TOTAL": work.units,
        "TOTAL_P": total,
        "WIDTH": power_of_2(max(pool.page for pool in work.ranked)),
        "FROM": first_units[work.own],
        "PAGE": own.page,
        "UNITS": own.units,
        "SIGNAL": work.signal,
        "HEADS": work.heads,
        "HIT": hit,
        "ABOVE": threshold if hit == "above" else 0.0,
        "SHARE": share_function(threshold, places) if hit == "top" else None,
        "MEMORY": work.memory[0],
        "FADE": work.memory[1],
        "WEIGHT": work.weight,
        "UPDATES": work.updates,
        "BUDGET": count_function(work.budget, places),
        "WINDOW": count_function(work.window, places) if work.window is not None else None,
        "FIRST": count_function(work.first, places) if work.first is not None else None,
        "CADENCE": work.cadence,
        "MOST": work.most,
        # Trials of a digit times units are held in registers at once.
        "BITS": 4 if total <= 512 else 2 if total <= 2048 else 1,
    }


_IDLE: Constants = {
    **dict.fromkeys(("SPAN_START", "SPAN", "TOTAL", "TOTAL_P", "WIDTH", "FROM", "PAGE", "UNITS", "CADENCE", "MOST"), 0),
    **dict.fromkeys(("RANKED", "SHARE", "BUDGET", "WINDOW", "FIRST")),
    **dict.fromkeys(("SIGNAL", "HEADS", "HIT", "MEMORY"), "none"),
    "ABOVE": 0.0,
    "FADE": 0.0,
    "WEIGHT": 1.0,
    "UPDATES": False,
    "BITS": 1,
}


def span_of(work: Work) -> tuple[int, int]:
    """The first of the slots whose logits are wanted, and how many: those of the ranked pools, which are neighbours."""
    if not work.reads_logits:
        return 0, 0
    last = work.ranked[-1]
    return work.ranked[0].offset, last.offset + last.units * last.page - work.ranked[0].offset


def combine_warps(work: Work | None) -> int:
    """A row of units, or of tokens where each of them is read, lies in the registers of one program."""
    if work is None:
        return 4
    by_token = work.reads_logits or work.signal == "recency" or work.window is not None or work.first is not None
    numbers = power_of_2(work.units) * (power_of_2(max(pool.page for pool in work.ranked)) if by_token else 1)
    return 4 if numbers <= 1024 else 8 if numbers <= 4096 else 16


def first_link(seed: int) -> int:
    """``scorers.place._mix(0, seed)``, unsigned: where the chain of a drawn number starts."""
    whole = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15) & whole
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = ((z ^ (z >> shift)) * factor) & whole
    return z


def form_constants(form: Form, splits: Splits) -> tuple[Constants, Constants, Constants]:
    """The constants of both kernels, of ``split`` and of ``combine``."""
    return _form_constants(form, splits, bool(triton.knobs.runtime.interpret))


@lru_cache(maxsize=256)
def _form_constants(form: Form, splits: Splits, interpreted: bool) -> tuple[Constants, Constants, Constants]:
    """``interpreted`` is part of the key: the functions among the constants are made for one or the other."""
    shape = shape_constants(form.group, form.head_dim, form.slots, form.kv_heads)
    cut = split_constants(splits, form.group, form.arrival, form.work)
    return shape, cut, combine_constants(splits, form.work)
