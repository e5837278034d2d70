"""Launches of the two decode kernels: how the slots are split, what the scratch holds, which constants a form gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvpolicy.attention.kernels.decode import split
from kvpolicy.attention.kernels.form import Arrival, Form, Work
from kvpolicy.attention.kernels.launching import dot_dtype, power_of_2
from kvpolicy.attention.kernels.policy import combine
from kvpolicy.attention.kernels.quantities import count_function, share_function

BLOCK_UNITS = 64  # pages whose bounds one program computes
LONGEST_SPLIT = 8192  # slots: a program looks at all positions of its split at once
PROGRAMS_PER_PROCESSOR = 2
INTERPRETED_PROCESSORS = 4

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


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def shape_constants(group: int, head_dim: int, slots: int, kv_heads: int) -> Constants:
    """What both kernels know of a layer's shape."""
    return {"K": kv_heads, "G": group, "D": head_dim, "S": slots, "DP": max(16, power_of_2(head_dim))}


def split_constants(splits: Splits, group: int, arrival: Arrival | None, work: Work | None, wants: bool) -> Constants:
    """What ``split`` is specialised for, beside the shape; ``wants`` all logits where there is no work."""
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
        "TOTAL": work.units if work is not None else 0,
        "HEADS": work.heads if work is not None else "mean",
    }


def combine_constants(splits: Splits, work: Work | None) -> Constants:
    """What ``combine`` is specialised for, beside the shape."""
    constants: Constants = {"SPLITS": splits.count, "SPLITS_P": power_of_2(splits.count), **_IDLE}
    if work is None:
        return constants
    own, (start, span), total = work.ranked[work.own], span_of(work), power_of_2(work.units)
    first_units = [sum(pool.units for pool in work.ranked[:i]) for i in range(len(work.ranked))]
    places = {name: (number, by_head) for number, (name, by_head) in enumerate(work.reads)}
    hit, above = work.hit or ("none", 0.0)
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
        "ABOVE": above if hit == "above" else 0.0,
        "SHARE": share_function(above, places) if hit == "top" else None,
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
    """A row of units, or of tokens where their logits are read, lies in the registers of one program."""
    if work is None:
        return 4
    numbers = power_of_2(work.units) * power_of_2(max(pool.page for pool in work.ranked))
    return 4 if numbers <= 1024 else 8 if numbers <= 4096 else 16


def first_link(seed: int) -> int:
    """``scorers.place._mix(0, seed)``, unsigned: where the chain of a drawn number starts."""
    whole = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15) & whole
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = ((z ^ (z >> shift)) * factor) & whole
    return z


class Scratch:
    """Partial results of the splits in one float32 allocation: m and l [cells, SPLITS, G], acc [.., G, D], logits
    [cells, G, SPAN] and bounds [cells, TOTAL] where they are wanted."""

    def __init__(self, cells: int, splits: int, group: int, head_dim: int, span: int, total: int, like: Tensor) -> None:
        parts = cells * splits * group
        sizes = [parts, parts, parts * head_dim, cells * group * span, cells * total]
        whole = torch.empty(sum(-(-size // 4) * 4 for size in sizes), dtype=torch.float32, device=like.device)
        starts = [sum(-(-size // 4) * 4 for size in sizes[:i]) for i in range(len(sizes))]
        pieces = [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        self.m, self.l, self.acc = pieces[:3]
        self.logits = pieces[3] if span else None
        self.bounds = pieces[4] if total else None


def decode_step(
    form: Form, query: Tensor, key: Tensor, value: Tensor, tensors: Mapping[str, Any], scaling: float
) -> Tensor:
    """Both launches of a fused step: query [B, Q, 1, D], key and value [B, K, 1, D] -> output [B, 1, Q, D].

    ``tensors`` are the op's by their roles in ``form.state`` and ``form.given``.
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    work, cells = form.work, query.shape[0] * form.kv_heads
    splits = Splits.of(cells, form.slots, form.head_dim, processors(query.device))
    constants, cut, join = _constants(form, splits)
    scratch = Scratch(
        cells,
        splits.count,
        form.group,
        form.head_dim,
        cut["SPAN"],
        cut["TOTAL"] if cut["BOXES"] else 0,
        query,
    )
    output = query.new_empty(query.shape[0], 1, query.shape[1], form.head_dim)
    ranked = range(len(cut["BOXES"]))
    bounds_programs = sum(-(-units // BLOCK_UNITS) for _, units, _, _ in cut["BOXES"])
    get = tensors.get
    split[(cells, splits.count + bounds_programs)](
        query, key, value, get("keys"), get("values"), get("position"), scratch.m, scratch.l, scratch.acc,
        scratch.logits, scratch.bounds, get("ring"), get("opened"), get("fill"), get("now"), get("ordinal_now"),
        get("t"), get("layer"), get("ordinal"), get("high"), get("low"), get("entry_memory"), get("drawn"),
        tuple(tensors[f"high.{i}"] for i in ranked), tuple(tensors[f"low.{i}"] for i in ranked), scaling,
        **constants, **cut, DOT=dot_dtype(split, query), num_warps=4, num_stages=3,
    )  # fmt: skip
    combine[(cells, 1 if work is None else 2)](
        output, scratch.m, scratch.l, scratch.acc, scratch.logits, scratch.bounds, get("position"), get("work_ordinal"),
        get("memory"), get("work_drawn"), get("work_ring"), get("tail"), get("peak"), get("work_opened"), get("seen"),
        get("t"), tuple(tensors[name] for name, _ in work.reads) if work else (),
        **constants, **join, num_warps=combine_warps(work),
    )  # fmt: skip
    return output


@lru_cache(maxsize=256)
def _constants(form: Form, splits: Splits) -> tuple[Constants, Constants, Constants]:
    shape = shape_constants(form.group, form.head_dim, form.slots, form.kv_heads)
    cut = split_constants(splits, form.group, form.arrival, form.work, False)
    return shape, cut, combine_constants(splits, form.work)


def attend_slots(
    query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scaling: float, wants_logits: bool
) -> tuple[Tensor, Tensor]:
    """Attention alone: query [B, K, G, D] over the resident slots -> output [B, K, G, D] and the masked float32 logits
    [B, K, G, S], or an empty tensor where they are not wanted."""
    batch, kv_heads, group, head_dim = query.shape
    query, slots, cells = query.contiguous(), keys.shape[2], batch * kv_heads
    splits = Splits.of(cells, slots, head_dim, processors(query.device))
    scratch = Scratch(cells, splits.count, group, head_dim, 0, 0, query)
    span = slots if wants_logits else 0
    logits = torch.full((batch, kv_heads, group, span), float("-inf"), dtype=torch.float32, device=query.device)
    output = torch.empty_like(query)
    shape = shape_constants(group, head_dim, slots, kv_heads)
    cut = split_constants(splits, group, None, None, False) | {"SPAN": span}
    idle = (None,) * 13
    split[(cells, splits.count)](
        query, None, None, keys, values, position, scratch.m, scratch.l, scratch.acc, logits if span else None,
        *idle, (), (), scaling, **shape, **cut, DOT=dot_dtype(split, query), num_warps=4, num_stages=3,
    )  # fmt: skip
    combine[(cells, 1)](
        output, scratch.m, scratch.l, scratch.acc, *(None,) * 12, (),
        **shape, **combine_constants(splits, None), num_warps=4,
    )  # fmt: skip
    return output, logits
