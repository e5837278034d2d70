"""The other claim: how many sequences fit a memory, and how many tokens a second they give together.

Sizes come from plans. Where a batch is run as well, its caches are filled with random numbers: a memory full of caches
has no room for the prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from kvpolicy.lab.bench.arms import make_arm
from kvpolicy.lab.bench.cases import WARM, Case
from kvpolicy.lab.bench.measuring import Bench
from kvpolicy.lab.bench.memory import measured
from kvpolicy.lab.bench.racing import Track
from kvpolicy.lab.bench.roofline import slot_bytes
from kvpolicy.lab.bench.rows import Capacity
from kvpolicy.lab.bench.timing import take_turns
from kvpolicy.plan import make_plan

USABLE = 0.92
"""The share of a memory that weights and caches may take; the rest is for activations."""

PROMPT = 16
"""Prompt tokens that a full batch reads where it is run."""


@torch.no_grad()
def capacities(bench: Bench, memory: int, *, run: bool) -> Iterator[Capacity]:
    """For every context, the full cache and every policy: the largest batch in ``memory`` bytes, weights included.

    run: time steps at that batch, too.
    """
    for context in bench.options.contexts:
        groups = bench.groups(1, context)
        own = [entry for group in groups for entry in group if entry.name in ("dense", "policy")]
        found = [capacity_of(bench, entry.label, entry.case, memory) for entry in own]
        for entry, row in zip(own, found, strict=True):
            if run and row.batch:
                _run(bench, entry.name, entry.case, row)
        dense = next((row for row in found if row.label == "dense"), None)
        for row in found:
            if row is not dense and dense is not None:
                one, other = row.tokens_per_second, dense.tokens_per_second
                if one is None or other is None:
                    one, other = row.ideal_tokens_per_second, dense.ideal_tokens_per_second
                row.times_dense = one / other if other else None
            yield row


def capacity_of(bench: Track, label: str, case: Case, memory: int) -> Capacity:
    """What fits, by the plan: every buffer of a cache has its rows first, so a row costs the same in every batch."""
    one = case.plan.bytes // case.batch
    batch = max(0, int(memory * USABLE) - bench.model_bytes) // one
    read = bench.weights + batch * slot_bytes(case.plan) // case.batch
    return Capacity(label, case.context, case.budget, one, batch, batch * bench.bandwidth / read)


def _run(bench: Track, name: str, case: Case, row: Capacity) -> None:
    """Time steps at the largest batch, or at nine tenths of it where the allocator says no."""
    row.notes.append("caches filled with random numbers; nothing is evicted in these steps")
    for _ in range(3):
        bench.tell(f"{row.label}: {row.batch} rows of {row.context:,} tokens")
        try:
            _time(bench, name, case, row)
            return
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error):
                raise
            row.notes.append(f"a batch of {row.batch} did not fit")
            row.batch = max(1, row.batch * 9 // 10)
        bench.forget()


def _time(bench: Track, name: str, case: Case, row: Capacity) -> None:
    plan = case.plan
    read = plan.prompt[1] if plan.reads_lengths else min(PROMPT, plan.prompt[1])
    large = make_plan(
        case.policy, bench.shape, batch=row.batch, prompt=(read, plan.prompt[1]), max_new_tokens=plan.max_new_tokens
    )
    arm = make_arm(
        name, replace(case, plan=large, batch=row.batch, prompt=read, room=plan.prompt[1] + 1), bench.model,
        compile=bench.compile, backend=bench.backend,
    )  # fmt: skip
    with measured(bench.device) as usage:
        arm.build()
    arm.read()
    for _ in range(WARM):
        arm.step()
    take_turns([arm], bench.device, rounds=bench.turns, block=bench.block, tell=lambda done: None)
    row.ms, row.allocated_bytes = arm.steps.ms, bench.model_bytes + usage.kept
    row.tokens_per_second = 1e3 * row.batch / arm.steps.ms
    del arm
    bench.forget()
