"""Launches of the decode kernels that are compiled ahead of time, see examples.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from kvpolicy.attention.kernels.examples import Example
from kvpolicy.attention.kernels.form import Arrival, Form, Ranked, Work
from kvpolicy.attention.kernels.launch import attend_launches, decode_launches


def examples() -> Iterator[Example]:
    """Both kernels for the shape of Llama-3.1-8B: one pool ranked by attention that is summed up under a window, pages
    of two pools ranked by their bounds, and one pool ranked by lot."""
    heavy = Work(
        ranked=(Ranked(0, 1, 2049, True),),
        own=0,
        signal="attention",
        heads="mean",
        hit=None,
        memory=("sum", 0.0),
        weight=1.0,
        updates=True,
        budget=("const", 2048, 1, False),
        window=("//", ("name", "prompt_len"), ("const", 10, 1, False)),
        first=None,
        cadence=1,
        most=1,
        reads=(("prompt_len", False),),
    )
    pages = replace(
        heavy,
        ranked=(Ranked(0, 16, 64, False), Ranked(1024, 16, 65, True)),
        own=1,
        signal="page-bound",
        heads="max",
        hit=("top", ("const", 1, 2, True)),
        memory=("last-hit", 0.0),
        budget=("-", ("const", 2048, 1, False), ("size", "prompt")),
        window=None,
        cadence=16,
        most=4,
        reads=(("size(prompt)", True),),
    )
    yield from _examples(Form(4, 8, 128, 2049, Arrival(0, 1, 2049, "zero"), heavy, (), ()))
    yield from _examples(Form(4, 8, 128, 2064, Arrival(1024, 16, 65, "clock"), pages, (), ()))
    lot = replace(heavy, signal="random", memory=("none", 0.0), window=None, reads=())
    yield from _examples(Form(4, 8, 128, 2049, Arrival(0, 1, 2049, seed=0), lot, (), ()))
    query, slots = torch.empty(1, 8, 4, 128, dtype=torch.bfloat16, device="meta"), (1, 8, 2048)
    keys = torch.empty(*slots, 128, dtype=torch.bfloat16, device="meta")
    position = torch.empty(slots, dtype=torch.int32, device="meta")
    for launch in attend_launches(query, keys, keys, position, 0.1, True, 132)[2]:
        yield launch.example()


def _examples(form: Form) -> Iterator[Example]:
    """The launches of a form over tensors that exist by their type alone."""
    whole = ("opened", "fill", "t", "work_opened", "seen", "tail", "peak", "prompt_len", "size(prompt)")
    numbers = ("position", "ring", "now", "ordinal_now", "ordinal", "work_ring", "work_ordinal")
    types = dict.fromkeys(whole, torch.int64) | dict.fromkeys(numbers, torch.int32)
    types |= dict.fromkeys(("keys", "values"), torch.bfloat16)
    if form.arrival.starts:
        kept = torch.int32 if form.arrival.starts == "clock" else torch.float32
        types |= dict.fromkeys(("memory", "entry_memory"), kept)
    if form.arrival.seed is not None:
        types |= {"drawn": torch.float32, "work_drawn": torch.float32, "layer": torch.int64}
    if form.work is not None and form.work.signal == "page-bound":
        types |= dict.fromkeys(("high", "low", "high.0", "low.0", "high.1", "low.1"), torch.bfloat16)
    tensors = {role: torch.empty(1, dtype=dtype, device="meta") for role, dtype in types.items()}
    query = torch.empty(1, form.group * form.kv_heads, 1, form.head_dim, dtype=torch.bfloat16, device="meta")
    key = torch.empty(1, form.kv_heads, 1, form.head_dim, dtype=torch.bfloat16, device="meta")
    for launch in decode_launches(form, query, key, key, tensors, 0.1, 132)[1]:
        yield launch.example()
