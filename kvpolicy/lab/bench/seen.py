"""Whether a step costs more the more a cache has seen: each arm against itself, early and late, taking turns."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.arms import Arm, PolicyArm, make_arm
from kvpolicy.lab.bench.cases import WARM, full_cache, policy_case
from kvpolicy.lab.bench.measuring import Bench, Subject
from kvpolicy.lab.bench.rows import Growth
from kvpolicy.lab.bench.timing import take_turns
from kvpolicy.models.processes import processes
from kvpolicy.plan import make_plan


@torch.no_grad()
def growths(bench: Bench, seen: tuple[int, int]) -> list[Growth]:
    """Every policy at every budget, and every full cache that is asked for, after ``seen`` tokens.

    On the way there policies get random keys, values and queries, layer by layer, without the model around them.

    Raises:
        UsageError: the first number is not after the prompt and the warm-up, or the second not after the first.
    """
    early, late = seen
    if not 0 < early < late:
        raise UsageError(f"--seen {early},{late}: give two lengths, the smaller first, as in --seen 2k,50k")
    cells: list[tuple[int, int | None, Subject | str]] = []
    for batch in bench.options.batches:
        cells += [(batch, budget, subject) for budget in bench.options.budgets for subject in bench.subjects]
        names = (name for name in bench.options.against if name in ("dense", "hf-dynamic", "hf-static"))
        cells += [(batch, None, name) for name in names]

    def growth(cell: tuple[int, int | None, Subject | str]) -> Growth:
        batch, budget, whose = cell
        if isinstance(whose, str):
            bench.tell(f"{whose}: filled up to {early:,} and {late:,} tokens")
            return _growth(bench, whose, None, seen, _full(bench, whose, batch, seen))
        bench.tell(f"{whose.label}: on the way to {early:,} and {late:,} tokens")
        return _growth(bench, whose.label, budget, seen, _pair(bench, whose, budget, batch, seen))

    return processes().spread(cells, growth)


def _pair(bench: Bench, subject: Subject, budget: int | None, batch: int, seen: tuple[int, int]) -> list[Arm]:
    """Two caches of one plan, made for the longer text."""
    options = bench.options
    case = policy_case(
        subject.policy, subject.label, bench.shape, context=seen[0], budget=budget, batch=batch, steps=options.steps,
        prompt=min(options.prompt or seen[0], max(1, (budget or seen[0]) // 2)), given=subject.given,
    )  # fmt: skip
    # Settings were found for the shorter text; the plan is for the longer one, so that both caches have one shape.
    plan = make_plan(
        case.policy, bench.shape, batch=batch, prompt=case.prompt, max_new_tokens=seen[1] - case.prompt + options.steps
    )
    case = replace(case, plan=plan)
    arms: list[Arm] = []
    for length in seen:
        arm = PolicyArm("policy", case, bench.model, compile=bench.compile, backend=bench.backend)
        arm.build()
        arm.read()
        arm.advance(length - WARM - case.prompt)
        for _ in range(WARM):
            arm.step()
        arms.append(arm)
    return arms


def _full(bench: Bench, name: str, batch: int, seen: tuple[int, int]) -> list[Arm]:
    arms = []
    for length in seen:
        prompt = min(bench.options.prompt or WARM, length)
        case = full_cache(
            bench.dense,
            length + bench.options.steps,
            bench.shape,
            batch=batch,
            steps=bench.options.steps,
            prompt=prompt,
        )
        arm = make_arm(name, case, bench.model, compile=bench.compile, backend=bench.backend)
        arm.build()
        arm.read()
        for _ in range(WARM):
            arm.step()
        arm.rewind(WARM)
        arms.append(arm)
    return arms


def _growth(bench: Bench, label: str, budget: int | None, seen: tuple[int, int], arms: list[Arm]) -> Growth:
    before = arms[-1].evicted()
    take_turns(
        arms, bench.device, rounds=bench.turns, block=bench.block,
        tell=lambda done: bench.tell(f"{label}: round {done} of {bench.turns}"),
    )  # fmt: skip
    evicted = arms[-1].evicted() - before
    if budget is not None and not evicted:
        raise UsageError(
            f"{label} evicted nothing in {bench.options.steps} timed steps after {seen[1]:,} tokens; give more "
            "--new-tokens or a smaller --budget"
        )
    early, late = (arm.steps.ms for arm in arms)
    del arms
    bench.forget()
    return Growth(label, budget, seen, (early, late), late / early, evicted)
