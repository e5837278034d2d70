"""Arms side by side: each is made ready alone, then all take turns, and rows say what came of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.lab.bench.arms import Arm, make_arm
from kvpolicy.lab.bench.cases import LOOKED_AT, Case
from kvpolicy.lab.bench.counting import launches
from kvpolicy.lab.bench.memory import measured
from kvpolicy.lab.bench.models import shallow
from kvpolicy.lab.bench.roofline import copy_bandwidth, share, weight_bytes
from kvpolicy.lab.bench.rows import Row
from kvpolicy.lab.bench.timing import synchronize, take_turns, timed
from kvpolicy.plan import ModelGeometry, make_plan

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """An arm that is to run: its name, what it is called, and its text. ``backend``: another than the track's own."""

    name: str
    label: str
    case: Case
    backend: str | None = None


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


class Track:
    """One model, and how it is timed.

    Args:
        steps: timed steps of each arm, in ``rounds`` turns.
        compile, backend: as in ``kvpolicy.apply``.
        count: whether launches are counted.
        tell: hears what is being done.
    """

    def __init__(
        self, model: Any, *, steps: int, rounds: int, compile: bool, backend: str, count: bool, tell: Tell
    ) -> None:
        self.model, self.tell = model, tell
        self.compile, self.backend, self.count = compile, backend, count
        self.block = max(1, steps // rounds)
        self.turns = steps // self.block
        self.device: torch.device = model.device
        self.device_name = device_name(self.device)
        self.shape = ModelGeometry.from_config(model.config, str(model.dtype).removeprefix("torch."))
        self.weights = weight_bytes(model)
        self.model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.bandwidth = copy_bandwidth(self.device)
        self._slopes: dict[str, float | None] = {}

    def race(self, entries: Sequence[Entry], where: str, standing: Running | None = None) -> list[Row]:
        """Make arms ready, let them take turns, and say what came of it.

        Args:
            standing: an arm that is ready and runs along; it gets no row here.

        Raises:
            UsageError: a policy evicted nothing while it was timed.
        """
        running = [] if standing is None else [standing]
        for entry in entries:
            shown = entry.label if entry.name == "policy" else entry.name
            self.tell(f"{where}: {shown} reads {entry.case.prompt:,} tokens")
            running.append(self.ready(entry))
        start = 0 if standing is None else len(standing.arm.steps.seconds)
        take_turns(
            [each.arm for each in running],
            self.device,
            rounds=self.turns,
            block=self.block,
            tell=lambda done: self.tell(f"{where}: round {done} of {self.turns}"),
        )
        rows = list(self._rows(running, standing, start))
        del running
        self.forget(compiled=standing is None)
        return rows

    def forget(self, compiled: bool = True) -> None:
        """Give back what arms held that are gone; compiled code as well, where no arm is left that runs it."""
        gc.collect()
        if compiled:
            torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def ready(self, entry: Entry) -> Running:
        """Build an arm, read its prompt, and step until it may be timed."""
        case = entry.case
        arm = self._arm(entry, self.model)
        running = Running(arm, entry.label, case.budget)
        with measured(self.device) as usage:
            arm.build()
        running.allocated = usage.kept
        with measured(self.device) as usage:
            running.prompt_seconds = arm.read()
        running.prompt_peak = usage.peak
        running.allocated += usage.kept if entry.name.startswith("hf-") else 0
        for _ in range(case.warm - 2 * LOOKED_AT):
            running.warm_seconds.append(timed(arm.step, self.device))
        with measured(self.device) as usage:
            for _ in range(LOOKED_AT):
                arm.step()
        arm.rewind(case.warm - LOOKED_AT)
        running.step_peak, running.reserved = usage.peak, usage.reserved
        if self.count:
            running.launches = launches(arm.step, LOOKED_AT, self.device)
            running.launches_per_layer = self._slope(entry, running.launches)
        else:
            for _ in range(LOOKED_AT):
                arm.step()
        arm.rewind(LOOKED_AT)
        synchronize(self.device)
        running.evicted_before = arm.evicted()
        return running

    def _arm(self, entry: Entry, model: Any) -> Arm:
        return make_arm(entry.name, entry.case, model, compile=self.compile, backend=entry.backend or self.backend)

    def _slope(self, entry: Entry, whole: float) -> float | None:
        """Launches that one more layer costs; looked for once for each policy, as batch and lengths hardly matter."""
        layers, key, case = self.shape.layers, entry.label, entry.case
        if key not in self._slopes and layers > 1:
            self._slopes[key] = None
            with suppress(PolicyError):  # an override that names a layer which a model of one layer does not have
                plan, shape = case.plan, replace(self.shape, layers=1)
                one = make_plan(
                    case.policy, shape, batch=case.batch, prompt=plan.prompt, max_new_tokens=plan.max_new_tokens
                )
                arm = self._arm(replace(entry, case=replace(case, plan=one)), shallow(self.model, 1))
                arm.build()
                arm.read()
                for _ in range(case.warm - LOOKED_AT):
                    arm.step()
                self._slopes[key] = (whole - launches(arm.step, LOOKED_AT, self.device)) / (layers - 1)
        return self._slopes.get(key)

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
            row = self.row(each)
            for name, (ms, size) in references.items():
                if name != each.name:
                    row.ratios[name], row.ideal[name] = ms / row.ms, size / row.step_bytes
            yield row

    def _step_bytes(self, running: Running) -> int:
        return self.weights + running.arm.read_bytes

    def row(self, running: Running) -> Row:
        arm, case = running.arm, running.arm.case
        ms, size = arm.steps.ms, self._step_bytes(running)
        evicted = arm.evicted() - running.evicted_before
        if running.name == "policy":
            self._check_fired(running, evicted)
        read_in_full = case.prompt == case.room
        graphs: dict[str, Any] = arm.graphs()
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
            **graphs,
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


def device_name(device: torch.device) -> str:
    """What a device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "CPU"
