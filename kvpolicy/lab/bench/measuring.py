"""The benchmark: which arms run beside one another, and the rows that come of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.lab.bench.arms import Arm, make_arm, refusal
from kvpolicy.lab.bench.cases import LOOKED_AT, Case, full_cache, policy_case
from kvpolicy.lab.bench.counting import kernels_visible, launches
from kvpolicy.lab.bench.memory import available, gigabytes, measured, total
from kvpolicy.lab.bench.models import shallow
from kvpolicy.lab.bench.roofline import copy_bandwidth, share, weight_bytes
from kvpolicy.lab.bench.rows import Report, Row
from kvpolicy.lab.bench.timing import synchronize, take_turns, timed
from kvpolicy.language import Policy, load_policy
from kvpolicy.plan import ModelGeometry, make_plan

Tell = Callable[[str], None]


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

    @property
    def block(self) -> int:
        """Steps of one turn."""
        return max(1, self.steps // self.rounds)

    @property
    def turns(self) -> int:
        return self.steps // self.block


@dataclass
class Running:
    """An arm that stands ready, and what was seen while it was made."""

    arm: Arm
    label: str
    budget: int | None
    prompt_seconds: float = 0.0
    allocated: int = 0
    step_peak: int = 0
    prompt_peak: int = 0
    reserved: int | None = None
    launches: float | None = None
    launches_per_layer: float | None = None
    warm_seconds: list[float] = field(default_factory=list)
    evicted_before: int = 0

    @property
    def name(self) -> str:
        return self.arm.name


class Bench:
    """One model, some policies, one set of options."""

    def __init__(self, model: Any, subjects: Sequence[Subject], options: Options, tell: Tell = lambda text: None):
        self.model, self.subjects, self.tell = model, subjects, tell
        self.device: torch.device = model.device
        refused = {name: why for name in options.against if (why := refusal(name, self.device))}
        self.options = replace(options, against=[name for name in options.against if name not in refused])
        self.notes = [f"{name} is left out: {why}" for name, why in refused.items()]
        for subject in subjects:
            _check_evicts(subject.policy)
        self.shape = ModelGeometry.from_config(model.config, str(model.dtype).removeprefix("torch."))
        self.dense = load_policy("dense")
        self.device_name = device_name(self.device)
        self.weights = weight_bytes(model)
        self.model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.bandwidth = copy_bandwidth(self.device)
        self._slopes: dict[tuple[str, str], float | None] = {}

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
        with kernels_visible() if self.options.launches else nullcontext():
            for batch, context, groups in cells:
                report.rows += self._cell(batch, context, groups)
        return report

    # What runs beside what ------------------------------------------------------------------------------------------

    def groups(self, batch: int, context: int) -> list[list[tuple[str, str, Case]]]:
        """Arms that take turns, by name, label and case: a group for every budget, and one for transformers' caches.
        ``dense`` comes first where it is asked for, and runs through all groups."""
        options, against = self.options, self.options.against
        groups = []
        for budget in options.budgets:
            group = []
            if "dense-at-budget" in against and budget is not None:
                full = full_cache(
                    self.dense, budget, self.shape, batch=batch, steps=options.steps, prompt=options.prompt
                )
                group.append(("dense-at-budget", "dense", replace(full, context=context, budget=budget)))
            for subject in self.subjects:
                self.tell(f"planning {subject.label} for {context:,} tokens")
                case = policy_case(
                    subject.policy, subject.label, self.shape, context=context, budget=budget, batch=batch,
                    steps=options.steps, prompt=options.prompt, given=subject.given,
                )  # fmt: skip
                group.append(("policy", subject.label, case))
            groups.append(group)
        others = [name for name in against if name.startswith("hf-")]
        if others:
            full = full_cache(self.dense, context, self.shape, batch=batch, steps=options.steps, prompt=options.prompt)
            groups.append([(name, name, full) for name in others])
        if "dense" in against:
            steps = options.steps * len(groups)
            full = full_cache(self.dense, context, self.shape, batch=batch, steps=steps, prompt=options.prompt)
            groups[0].insert(0, ("dense", "dense", full))
        return groups

    def _check_room(self, batch: int, context: int, groups: list[list[tuple[str, str, Case]]]) -> None:
        shared = [case for name, _, case in groups[0] if name == "dense"]
        most = max(sum(_bytes(case) for name, _, case in group if name != "dense") for group in groups)
        needed = most + sum(_bytes(case) for case in shared)
        free = available(self.device)
        if needed > free and not self.options.force:
            largest = max((case for group in groups for _, _, case in group), key=_bytes)
            raise UsageError(
                f"batch {batch} at {context:,} tokens needs {gigabytes(needed)} for its caches, "
                f"{gigabytes(_bytes(largest))} of it for {largest.label}, and {gigabytes(free)} are free on "
                f"{self.device}; give fewer to --against, a smaller --batch or --context, or --force"
            )

    # One cell -------------------------------------------------------------------------------------------------------

    def _cell(self, batch: int, context: int, groups: list[list[tuple[str, str, Case]]]) -> Iterator[Row]:
        where = f"batch {batch}, {context:,} tokens"
        dense: Running | None = None
        rows: list[Row] = []
        for group in groups:
            running = [] if dense is None else [dense]
            for name, label, case in group:
                self.tell(f"{where}: {label if name == 'policy' else name} reads {case.prompt:,} tokens")
                running.append(self._ready(name, label, case))
            dense = next((each for each in running if each.name == "dense"), None)
            start = 0 if dense is None else len(dense.arm.steps.seconds)
            take_turns(
                [each.arm for each in running],
                self.device,
                rounds=self.options.turns,
                block=self.options.block,
                tell=lambda done: self.tell(f"{where}: round {done} of {self.options.turns}"),
            )
            rows += self._rows(running, dense, start)
            del running
            self.forget()
        if dense is not None:
            rows.insert(0, self._row(dense))
        return iter(rows)

    def forget(self) -> None:
        """Give back what arms held that are gone."""
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _ready(self, name: str, label: str, case: Case) -> Running:
        """Build an arm, read its prompt, and step until it may be timed."""
        arm = make_arm(name, case, self.model, compile=self.options.compile, backend=self.options.backend)
        running = Running(arm, label, case.budget)
        with measured(self.device) as usage:
            arm.build()
        running.allocated = usage.kept
        with measured(self.device) as usage:
            running.prompt_seconds = arm.read()
        running.prompt_peak = usage.peak
        running.allocated += usage.kept if name.startswith("hf-") else 0
        for _ in range(case.warm - 2 * LOOKED_AT):
            running.warm_seconds.append(timed(arm.step, self.device))
        with measured(self.device) as usage:
            for _ in range(LOOKED_AT):
                arm.step()
        arm.rewind(case.warm - LOOKED_AT)
        running.step_peak, running.reserved = usage.peak, usage.reserved
        if self.options.launches:
            running.launches = launches(arm.step, LOOKED_AT, self.device)
            running.launches_per_layer = self._slope(name, label, case, running.launches)
        else:
            for _ in range(LOOKED_AT):
                arm.step()
        arm.rewind(LOOKED_AT)
        synchronize(self.device)
        running.evicted_before = arm.evicted()
        return running

    def _slope(self, name: str, label: str, case: Case, whole: float) -> float | None:
        """Launches that one more layer costs; looked for once for each policy, as batch and lengths hardly matter."""
        layers = self.shape.layers
        if (name, label) not in self._slopes and layers > 1:
            self._slopes[name, label] = None
            with suppress(PolicyError):  # an override that names a layer which a model of one layer does not have
                plan = case.plan
                shape = replace(self.shape, layers=1)
                one = make_plan(
                    case.policy, shape, batch=case.batch, prompt=plan.prompt, max_new_tokens=plan.max_new_tokens
                )
                arm = make_arm(
                    name, replace(case, plan=one), shallow(self.model, 1),
                    compile=self.options.compile, backend=self.options.backend,
                )  # fmt: skip
                arm.build()
                arm.read()
                for _ in range(case.warm - LOOKED_AT):
                    arm.step()
                single = launches(arm.step, LOOKED_AT, self.device)
                self._slopes[name, label] = (whole - single) / (layers - 1)
        return self._slopes.get((name, label))

    # Rows -----------------------------------------------------------------------------------------------------------

    def _rows(self, running: Sequence[Running], dense: Running | None, start: int) -> Iterator[Row]:
        """Rows of a group, held against the references in it; ``start``: dense's first step of this group."""
        references: dict[str, tuple[float, int]] = {}
        for each in running:
            if each.name != "policy":
                steps = each.arm.steps.since(start) if each is dense else each.arm.steps
                references[each.name] = steps.ms, self._step_bytes(each)
        for each in running:
            if each is dense:
                continue
            row = self._row(each)
            for name, (ms, size) in references.items():
                if name != each.name:
                    row.ratios[name], row.ideal[name] = ms / row.ms, size / row.step_bytes
            yield row

    def _step_bytes(self, running: Running) -> int:
        return self.weights + running.arm.read_bytes

    def _row(self, running: Running) -> Row:
        arm, case = running.arm, running.arm.case
        ms, size = arm.steps.ms, self._step_bytes(running)
        evicted = arm.evicted() - running.evicted_before
        if running.name == "policy":
            self._check_fired(running, evicted)
        read_in_full = case.prompt == case.room
        return Row(
            arm=running.name,
            label=running.label,
            batch=case.batch,
            context=case.context,
            budget=case.budget,
            held=case.held,
            slots=case.slots,
            prompt=case.prompt,
            settings=dict(case.settings),
            compiled=arm.compiled,
            backend=arm.backend,
            ms=ms,
            quartiles=arm.steps.quartiles,
            by_kind=arm.steps.by_kind,
            timed_steps=len(arm.steps.seconds),
            prompt_ms=1e3 * running.prompt_seconds if read_in_full else None,
            step_bytes=size,
            roofline=share(size, ms / 1e3, self.bandwidth),
            planned_bytes=self.model_bytes + arm.cache_bytes,
            allocated_bytes=self.model_bytes + running.allocated,
            peak_bytes=self.model_bytes + running.allocated + running.step_peak,
            prompt_peak_bytes=self.model_bytes + running.allocated + running.prompt_peak if read_in_full else None,
            reserved_bytes=running.reserved,
            launches=running.launches,
            launches_per_layer=running.launches_per_layer,
            **arm.graphs(),
            compile_seconds=sum(s - ms / 1e3 for s in running.warm_seconds if s > 3e-3 * ms),
            evicted=evicted,
            evicted_before=running.evicted_before,
            notes=[note for note in (case.note, arm.note) if note],
        )

    def _check_fired(self, running: Running, evicted: int) -> None:
        case = running.arm.case
        if evicted > 0 or (not case.fires and running.evicted_before > 0):
            return
        raise UsageError(
            f"{running.label} evicted nothing in {len(running.arm.steps.seconds)} timed steps at a context of "
            f"{case.context:,} tokens, and a policy that never fired is not reported; give more --new-tokens, a longer "
            "--context or a smaller --budget"
        )


def _bytes(case: Case) -> int:
    return case.plan.bytes


def _check_evicts(policy: Policy) -> None:
    patches = [patch for override in policy.overrides for patch in (override.pools or {}).values()]
    if all(pool is None or pool.budget is None for pool in [*policy.pools.values(), *patches]):
        raise UsageError(
            f"{policy.name} has no budget and never evicts; it is what policies are held against: --against dense"
        )


def device_name(device: torch.device) -> str:
    """What a device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "CPU"
