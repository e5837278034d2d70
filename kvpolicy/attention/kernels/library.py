"""The kernels as operations of torch: compilers take them whole, and fake tensors know their shapes.

Where no kernel can run (``available``), an operation is the torch backend's function, so that what was written for a
GPU can be traced, compiled and checked anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.attention import columns
from kvpolicy.attention.kernels import available, prompt


@torch.library.custom_op("kvpolicy::prompt_scores", mutates_args=())
def prompt_scores(
    query: Tensor,
    keys: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    scaling: float,
    signal: str,
    heads: str,
) -> Tensor:
    """``attention.columns.prompt_scores``."""
    compute = columns.prompt_scores if available(query.device) else prompt.launch
    return compute(query, keys, query_position, key_position, scaling, signal, heads)


@prompt_scores.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    scaling: float,
    signal: str,
    heads: str,
) -> Tensor:
    rows, kv_heads, slots = key_position.shape
    lines = query.shape[1] // kv_heads if heads == "each" else 1
    return query.new_empty(rows, kv_heads, lines, slots, dtype=torch.float32)


def window_scores(
    query: Tensor,
    keys: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    scaling: float,
    last: int,
    signal: str,
    heads: str,
) -> Tensor:
    """``attention.columns.window_scores``, by the operation above."""
    return columns.window_scores(
        query, keys, query_position, key_position, scaling, last, signal, heads, scores=prompt_scores
    )
