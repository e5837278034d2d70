"""The benchmark: which arms run beside one another, and the report that comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.arms import AT_BUDGET, refusal
from kvpolicy.lab.bench.cases import Case, full_cache, policy_case
from kvpolicy.lab.bench.counting import kernels_visible
from kvpolicy.lab.bench.memory import available, gigabytes, total
from kvpolicy.lab.bench.racing import Entry, Tell, Track
from kvpolicy.lab.bench.rows import Report, Row
from kvpolicy.language import Policy, load_policy
from kvpolicy.models.processes import processes


@dataclass(frozen=True)
class Subject:
    """A policy to time: what it is called, and the params that the user set."""

    label: str
    policy: Policy
    given: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What to run. ``steps`` are timed for each arm in ``rounds`` turns; a budget of None leaves policies as they are.

    ``prompt``: tokens that the model reads, None for the whole context; full caches are filled up with random numbers.
    """

    contexts: Sequence[int]
    budgets: Sequence[int | None]
    batches: Sequence[int] = (1,)
    steps: int = 64
    rounds: int = 16
    prompt: int | None = None
    against: Sequence[str] = ("dense", "dense-at-budget")
    compile: bool = False
    backend: str = "auto"
    launches: bool = True
    force: bool = False


class Bench(Track):
    """One model, some policies, one set of options."""

    def __init__(self, model: Any, subjects: Sequence[Subject], options: Options, tell: Tell = lambda text: None):
        super().__init__(
            model, steps=options.steps, rounds=options.rounds, compile=options.compile, backend=options.backend,
            count=options.launches, tell=tell,
        )  # fmt: skip
        self.subjects = subjects
        refused = {name: why for name in options.against if (why := refusal(name, self.device))}
        self.options = replace(options, against=[name for name in options.against if name not in refused])
        self.notes = [f"{name} is left out: {why}" for name, why in refused.items()]
        if processes().count > 1:
            self.notes.append(_in_processes(processes().count, self.device.type))
        for subject in subjects:
            _check_evicts(subject.policy)
        self.dense = load_policy("dense")

    @torch.no_grad()
    def run(self, name: str) -> Report:
        """All rows of equal batch.

        Raises:
            UsageError: a row makes no sense or would not fit; or a policy evicted nothing while it was timed.
        """
        report = Report(name, self.device_name, self.bandwidth, self.weights, total(self.device))
        report.notes += self.notes
        cells = [(batch, context, self.groups(batch, context)) for context in self.options.contexts
                 for batch in self.options.batches]  # fmt: skip
        for batch, context, groups in cells:
            self._check_room(batch, context, groups)

        def measured(cell: tuple[int, int, list[list[Entry]]]) -> list[Row]:
            batch, context, groups = cell
            return list(self._cell(f"batch {batch}, {context:,} tokens", groups))

        with kernels_visible() if self.options.launches else nullcontext():
            for rows in processes().spread(cells, measured):
                report.rows += rows
        return report

    # What runs beside what ------------------------------------------------------------------------------------------

    def groups(self, batch: int, context: int) -> list[list[Entry]]:
        """What takes turns: a group for every budget, and one for transformers' caches of the context's length.
        ``dense`` comes first where it is asked for, and runs through all groups."""
        options = self.options
        groups = [self._at_budget(batch, context, budget) for budget in options.budgets]
        others = [name for name in options.against if name.startswith("hf-") and not name.endswith(AT_BUDGET)]
        if others:
            full = self._full(context, batch, options.steps)
            groups.append([Entry(name, name, full) for name in others])
        if "dense" in options.against:
            groups[0].insert(0, Entry("dense", "dense", self._full(context, batch, options.steps * len(groups))))
        return groups

    def _at_budget(self, batch: int, context: int, budget: int | None) -> list[Entry]:
        """The full caches as long as a budget that are asked for, and every policy."""
        options, entries = self.options, []
        for name in (name for name in options.against if name.endswith(AT_BUDGET)):
            if budget is not None:
                full = replace(self._full(budget, batch, options.steps), context=context, budget=budget)
                entries.append(Entry(name, "dense" if name.startswith("dense") else name, full))
        for subject in self.subjects:
            self.tell(f"planning {subject.label} for {context:,} tokens")
            case = policy_case(
                subject.policy, subject.label, self.shape, context=context, budget=budget, batch=batch,
                steps=options.steps, prompt=options.prompt, given=subject.given,
            )  # fmt: skip
            entries.append(Entry("policy", subject.label, case))
        return entries

    def _full(self, length: int, batch: int, steps: int) -> Case:
        return full_cache(self.dense, length, self.shape, batch=batch, steps=steps, prompt=self.options.prompt)

    def _check_room(self, batch: int, context: int, groups: list[list[Entry]]) -> None:
        shared = [entry.case for entry in groups[0] if entry.name == "dense"]
        most = max(sum(_bytes(entry.case) for entry in group if entry.name != "dense") for group in groups)
        needed = most + sum(_bytes(case) for case in shared)
        free = available(self.device)
        if needed > free and not self.options.force:
            largest = max((entry.case for group in groups for entry in group), key=_bytes)
            raise UsageError(
                f"batch {batch} at {context:,} tokens needs {gigabytes(needed)} for its caches, "
                f"{gigabytes(_bytes(largest))} of it for {largest.label}, and {gigabytes(free)} are free on "
                f"{self.device}; give fewer to --against, a smaller --batch or --context, or --force"
            )

    def _cell(self, where: str, groups: list[list[Entry]]) -> Iterator[Row]:
        """Group after group; ``dense`` stays through all of them."""
        dense, first = None, groups[0]
        if first[0].name == "dense":
            self.tell(f"{where}: dense reads {first[0].case.prompt:,} tokens")
            dense, first = self.ready(first[0]), first[1:]
        rows = [row for group in [first, *groups[1:]] for row in self.race(group, where, dense)]
        if dense is not None:
            yield self.row(dense)
            del dense
        self.forget()
        yield from rows


def _in_processes(count: int, device: str) -> str:
    if device == "cuda":
        return f"{count} processes measured, each with a GPU of its own; a row and what it is held against are of one"
    return f"{count} processes measured at once on one {device}: every time here is of a step beside others"


def _bytes(case: Case) -> int:
    return case.plan.bytes


def _check_evicts(policy: Policy) -> None:
    patches = [patch for override in policy.overrides for patch in (override.pools or {}).values()]
    if all(pool is None or pool.budget is None for pool in [*policy.pools.values(), *patches]):
        raise UsageError(
            f"{policy.name} has no budget and never evicts; it is what policies are held against: --against dense"
        )
