"""Prompt scores, selected pages and quantised pools as operations of torch: compilers take them whole.

Where no kernel can run (``available``), an operation is the torch backend's function, so that what was written for a
GPU can be traced, compiled and checked anywhere, also without triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.attention import columns, paged
from kvpolicy.attention import quantised as stored
from kvpolicy.attention.formula import Formula
from kvpolicy.attention.kernels import available


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
    if available(query.device) is not None:
        return columns.prompt_scores(query, keys, query_position, key_position, Formula(scaling), signal, heads)
    from kvpolicy.attention.kernels import prompt

    return prompt.launch(query, keys, query_position, key_position, scaling, signal, heads)


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
    return query.new_empty((rows, kv_heads, lines, slots), dtype=torch.float32)


@torch.library.custom_op("kvpolicy::attend_pages", mutates_args=())
def attend_pages(
    query: Tensor, keys: Tensor, values: Tensor, position: Tensor, index: Tensor, page: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """``attention.paged.attend_pages``."""
    if available(query.device) is not None:
        return paged.attend_pages(query, keys, values, position, index, page, Formula(scaling))
    from kvpolicy.attention.kernels import pages

    return pages.launch(query, keys, values, position, index, page, scaling)


@attend_pages.register_fake
def _(
    query: Tensor, keys: Tensor, values: Tensor, position: Tensor, index: Tensor, page: int, scaling: float
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("kvpolicy::attend_quantised", mutates_args=())
def attend_quantised(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    position: Tensor,
    bits: int,
    group: int,
    keys_by: str,
    values_by: str,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """``attention.quantised.attend_quantised``; ``keys`` and ``values`` are each codes, scale and zero."""
    opened_keys = stored.Quantised(keys[0], keys[1], keys[2], bits, group, keys_by)
    opened_values = stored.Quantised(values[0], values[1], values[2], bits, group, values_by)
    if available(query.device) is not None:
        return stored.attend_quantised(query, opened_keys, opened_values, position, Formula(scaling))
    from kvpolicy.attention.kernels import quantised

    return quantised.launch(query, opened_keys, opened_values, position, scaling)


@attend_quantised.register_fake
def _(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    position: Tensor,
    bits: int,
    group: int,
    keys_by: str,
    values_by: str,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
