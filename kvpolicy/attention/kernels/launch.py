"""Launches of the two decode kernels: the scratch between them, and which tensor is which argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvpolicy.attention.kernels.constants import (
    BLOCK_UNITS,
    Splits,
    combine_constants,
    combine_warps,
    form_constants,
    shape_constants,
    split_constants,
)
from kvpolicy.attention.kernels.decode import split
from kvpolicy.attention.kernels.examples import Example
from kvpolicy.attention.kernels.form import Form
from kvpolicy.attention.kernels.policy import combine
from kvpolicy.attention.kernels.tiles import dot_dtype

INTERPRETED_PROCESSORS = 4


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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

    def arguments(self) -> dict[str, Tensor | None]:
        """As the kernels name them."""
        parts = {"part_m": self.m, "part_l": self.l, "part_acc": self.acc}
        return {**parts, "logits": self.logits, "bounds": self.bounds}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its arguments by name."""

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int = 3

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)

    def example(self) -> Example:
        """The same launch as the compiler sees it."""

        def seen(value: Any) -> Any:
            if isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
                return tuple(part.dtype for part in value)
            return value.dtype if isinstance(value, Tensor) else value

        arguments = {name: seen(value) for name, value in self.arguments.items()} | (
            {"scaling": float} if "scaling" in self.arguments else {}
        )
        return Example(self.kernel, arguments, self.num_warps, self.num_stages)


SPLIT_TENSORS = {  # an argument of `split`, and the role of its tensor
    "keys": "keys",
    "values": "values",
    "position": "position",
    "ring": "ring",
    "opened": "opened",
    "fill": "fill",
    "clock_position": "now",
    "clock_ordinal": "ordinal_now",
    "t": "t",
    "layer": "layer",
    "ordinal": "ordinal",
    "high": "high",
    "low": "low",
    "memory": "entry_memory",
    "drawn": "drawn",
}
COMBINE_TENSORS = {
    "position": "position",
    "ordinal": "work_ordinal",
    "memory": "memory",
    "drawn": "work_drawn",
    "ring": "work_ring",
    "tail": "tail",
    "peak": "peak",
    "opened": "work_opened",
    "seen": "seen",
    "t": "t",
}


def decode_launches(
    form: Form,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: Mapping[str, Tensor],
    scaling: float,
    multiprocessors: int,
) -> tuple[Tensor, list[Launch]]:
    """A fused step: query [B, Q, 1, D], key and value [B, K, 1, D] -> output [B, 1, Q, D], once both launches ran.

    ``tensors`` are the op's by their roles in ``form.state`` and ``form.given``.
    """
    work, cells = form.work, query.shape[0] * form.kv_heads
    splits = Splits.of(cells, form.slots, form.head_dim, multiprocessors)
    shape, cut, join = form_constants(form, splits)
    scratch = Scratch(cells, splits.count, form.group, form.head_dim, cut["SPAN"], cut["TOTAL"], query)
    output = query.new_empty(query.shape[0], 1, query.shape[1], form.head_dim)
    box_programs = sum(-(-units // BLOCK_UNITS) for _, units, _, _ in cut["BOXES"])
    first = Launch(
        split,
        (cells, splits.count + box_programs),
        {
            "query": query.contiguous(),
            "key": key.contiguous(),
            "value": value.contiguous(),
            "scaling": scaling,
            "highs": tuple(tensors[f"high.{i}"] for i in range(len(cut["BOXES"]))),
            "lows": tuple(tensors[f"low.{i}"] for i in range(len(cut["BOXES"]))),
            "DOT": dot_dtype(split, query),
            **{name: tensors.get(role) for name, role in SPLIT_TENSORS.items()},
            **scratch.arguments(),
            **shape,
            **cut,
        },
        num_warps=4,
    )
    second = Launch(
        combine,
        (cells, 1 if work is None else 2),
        {
            "output": output,
            "reads": tuple(tensors[name] for name, _ in work.reads) if work else (),
            **{name: tensors.get(role) for name, role in COMBINE_TENSORS.items()},
            **scratch.arguments(),
            **shape,
            **join,
        },
        num_warps=combine_warps(work),
    )
    return output, [first, second]


def decode_step(
    form: Form, query: Tensor, key: Tensor, value: Tensor, tensors: Mapping[str, Tensor], scaling: float
) -> Tensor:
    """Run ``decode_launches``."""
    output, launches = decode_launches(form, query, key, value, tensors, scaling, processors(query.device))
    for launch in launches:
        launch.run()
    return output


def attend_launches(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scaling: float,
    wants_logits: bool,
    multiprocessors: int,
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Attention alone: query [B, K, G, D] over the resident slots -> output [B, K, G, D] and the masked float32 logits
    [B, K, G, S], or an empty tensor where they are not wanted, once both launches ran."""
    batch, kv_heads, group, head_dim = query.shape
    slots, cells = keys.shape[2], batch * kv_heads
    splits = Splits.of(cells, slots, head_dim, multiprocessors)
    span = slots if wants_logits else 0
    logits = torch.full((batch, kv_heads, group, span), float("-inf"), dtype=torch.float32, device=query.device)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    scratch = Scratch(cells, splits.count, group, head_dim, 0, 0, query).arguments()
    shape = shape_constants(group, head_dim, slots, kv_heads)
    first = Launch(
        split,
        (cells, splits.count),
        {
            **dict.fromkeys((*SPLIT_TENSORS, "key", "value")),
            "query": query.contiguous(),
            "keys": keys,
            "values": values,
            "position": position,
            "scaling": scaling,
            "highs": (),
            "lows": (),
            "DOT": dot_dtype(split, query),
            **scratch,
            **shape,
            **split_constants(splits, group, None, None),
            "SPAN": span,
            "logits": logits if span else None,
        },
        num_warps=4,
    )
    rest = {"output": output, "reads": (), **shape, **combine_constants(splits, None), **scratch}
    second = Launch(combine, (cells, 1), {**dict.fromkeys(COMBINE_TENSORS), **rest}, num_warps=4)
    return output, logits, [first, second]


def attend_slots(
    query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scaling: float, wants_logits: bool
) -> tuple[Tensor, Tensor]:
    """Run ``attend_launches``."""
    several = processors(query.device)
    output, logits, launches = attend_launches(query, keys, values, position, scaling, wants_logits, several)
    for launch in launches:
        launch.run()
    return output, logits
