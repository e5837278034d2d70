"""What was measured: rows of a report, as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

NOTHING_TO_WIN = 1.05
"""Below this ideal ratio there is nothing to win: both read about the same bytes."""

OVERHEAD = 0.95
"""Below this ratio to a full cache of the same size a policy costs something by itself."""

LAUNCH_BOUND = 0.5
"""Below this share of the bandwidth it is not bytes that a step waits for."""


@dataclass
class Row:
    """One arm in one setting. Milliseconds and bytes; tokens per row and KV head.

    Attributes:
        ms, quartiles, by_kind: of a step, see ``timing.Steps``. prompt_ms: to the first token; None where the prompt
            was not read in full.
        step_bytes: weights and slots, read once. roofline: the share of the copy bandwidth that this is.
        planned_bytes: weights and cache by the plan. allocated_bytes: weights and cache as allocated. peak_bytes: the
            most allocated during a step, prompt_peak_bytes during the prompt; reserved_bytes: CUDA's allocator.
        launches, launches_per_layer: of a step; the second is the slope over layers.
        evicted: in timed steps, over all layers, rows and heads; evicted_before: until then.
        ratios: by reference, how many times faster a step is. ideal: the same by bytes alone.
    """

    arm: str
    label: str
    batch: int
    context: int
    budget: int | None
    held: int
    slots: int
    prompt: int
    settings: dict[str, str]
    compiled: bool
    backend: str
    ms: float
    quartiles: tuple[float, float]
    by_kind: dict[str, float]
    timed_steps: int
    prompt_ms: float | None
    step_bytes: int
    roofline: float
    planned_bytes: int
    allocated_bytes: int
    peak_bytes: int
    prompt_peak_bytes: int | None
    reserved_bytes: int | None
    launches: float | None
    launches_per_layer: float | None
    graphs: int
    graph_breaks: int
    recompiles: int
    compile_seconds: float
    evicted: int
    evicted_before: int
    ratios: dict[str, float] = field(default_factory=dict)
    ideal: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.batch / self.ms

    @property
    def is_policy(self) -> bool:
        return self.arm == "policy"

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same row in another report."""
        return self.arm, self.label, self.batch, self.context, self.budget

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


@dataclass
class Capacity:
    """The largest batch of one arm that fits a memory beside the weights, by the plan; and what it gave where it ran.

    sequence_bytes: of one row. ideal_tokens_per_second: at that batch, were bytes all it waits for.
    """

    label: str
    context: int
    budget: int | None
    sequence_bytes: int
    batch: int
    ideal_tokens_per_second: float
    tokens_per_second: float | None = None
    ms: float | None = None
    allocated_bytes: int | None = None
    times_dense: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[Any, ...]:
        return "capacity", self.label, self.context, self.budget

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Growth:
    """A step after many tokens against one after few. Milliseconds."""

    label: str
    budget: int | None
    seen: tuple[int, int]
    ms: tuple[float, float]
    ratio: float
    evicted: int

    @property
    def key(self) -> tuple[Any, ...]:
        return "seen", self.label, self.budget, self.seen

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Report:
    """All that one run found. ``bandwidth`` is in bytes a second; ``memory`` is what the device has, in bytes."""

    model: str
    device: str
    bandwidth: float
    weight_bytes: int
    memory: int
    rows: list[Row] = field(default_factory=list)
    capacities: list[Capacity] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        told = {key: value for key, value in vars(self).items() if key not in ("rows", "capacities", "growths")}
        lists: dict[str, Any] = {"rows": self.rows, "capacities": self.capacities, "growths": self.growths}
        return (
            told
            | {key: [row.to_dict() for row in rows] for key, rows in lists.items()}
            | {"losses": list(self.losses())}
        )

    def losses(self) -> Iterator[str]:
        """A sentence for each row in which a policy is slower than something it is held against, with the reason."""
        for row in (row for row in self.rows if row.is_policy):
            lost = {name: ratio for name, ratio in row.ratios.items() if ratio < 1}
            if lost:
                told = ", ".join(f"{ratio:.2f}× of {name}" for name, ratio in lost.items())
                yield f"{name_of(row)}: {told}; {reason(row, next(iter(lost)))}"
        for capacity in self.capacities:
            if capacity.times_dense is not None and capacity.times_dense < 1:
                yield (
                    f"{capacity.label} at {capacity.context:,} tokens gives {capacity.times_dense:.2f}× the tokens a "
                    f"second of dense in the same memory"
                )


def name_of(row: Row) -> str:
    """`h2o, budget 1,024 of 4,096, batch 8`."""
    budget = "" if row.budget is None else f", budget {row.budget:,}"
    return f"{row.label}{budget} of {row.context:,}, batch {row.batch}"


def reason(row: Row, reference: str) -> str:
    """Why a policy does not win against a reference."""
    ideal, overhead = row.ideal.get(reference, 1.0), row.ratios.get("dense-at-budget", row.ratios.get("dense", 1.0))
    if reference == "dense-at-budget":
        why = "pure overhead: against a full cache of its own size there is nothing to win"
    elif ideal < NOTHING_TO_WIN:
        why = f"nothing to win at this length, where it reads {1 / ideal:.0%} of the bytes"
    elif overhead < OVERHEAD:
        why = f"its own work costs more than the {ideal:.2f}× that bytes would give"
    else:
        why = f"bytes would give {ideal:.2f}×"
    if row.roofline < LAUNCH_BOUND:
        waits = "launches and arithmetic" if row.compiled else "launches and Python, since nothing is compiled"
        why += f"; at {row.roofline:.0%} of the bandwidth it waits for {waits}"
    return why
