"""The targets as races: which arms run beside one another on a GPU, and which targets their ratios answer.

Caches that are longer than the prompt are filled up with random numbers: at 32k and 128k no prompt is read in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.capacity import USABLE
from kvpolicy.lab.bench.cases import Case, full_cache, policy_case
from kvpolicy.lab.bench.memory import gigabytes, measured
from kvpolicy.lab.bench.racing import Entry, Track
from kvpolicy.lab.bench.rows import Row
from kvpolicy.lab.gpu.targets import Outcome
from kvpolicy.language import Policy, load_policy
from kvpolicy.plan import Plan, make_plan
from kvpolicy.runtime import PolicyCache

SCORED = "h2o"
"""The policy of single targets: it looks at the scores of every step."""

OTHERS = ("scope-slide", "raas")
"""Policies that are shown beside it where one row is run."""


@dataclass(frozen=True)
class Sizes:
    """Lengths and batches of the targets; smaller ones try the way through them out."""

    budget: int = 2048
    short: int = 4096
    long: int = 32_768
    longest: int = 131_072
    few: int = 8
    some: int = 16
    many: int = 64
    steps: int = 64
    rounds: int = 8
    memory: int | None = None


SMALL = Sizes(
    budget=64, short=128, long=512, longest=1024, few=2, some=3, many=4, steps=16, rounds=4, memory=50_000_000
)
"""For `--dry-run`."""


@dataclass
class Session:
    """A track, the sizes, and all rows so far."""

    track: Track
    sizes: Sizes
    rows: list[Row] = field(default_factory=list)
    capacities: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dense = load_policy("dense")
        self.prompt = self.sizes.budget * 15 // 16

    def full(self, length: int, batch: int, name: str | None = None) -> Entry:
        """A full cache of a length; by default our own."""
        case = full_cache(self.dense, length, self.track.shape, batch=batch, steps=self.sizes.steps, prompt=self.prompt)
        return Entry(name or f"dense, {length:,}", name or "dense", case)

    def policy(self, name: str, batch: int, *, length: int | None = None, backend: str | None = None) -> Entry:
        """A policy at the budget. ``length``: of the cache it is held against; it does not matter to the policy, which
        reads a prompt below the budget and is timed when it has evicted."""
        case = policy_case(
            load_policy(name), name, self.track.shape, context=4 * self.sizes.budget, budget=self.sizes.budget,
            batch=batch, steps=self.sizes.steps, prompt=self.prompt,
        )  # fmt: skip
        case = replace(case, context=length or self.sizes.budget)
        return Entry("policy", name if backend is None else f"{name}, {backend}", case, backend)

    def race(self, entries: Sequence[Entry], where: str) -> dict[str, Row]:
        """The policies' rows by label."""
        rows = self.track.race(entries, where)
        self.rows += rows
        return {row.label: row for row in rows}


@dataclass(frozen=True)
class Job:
    """One race. ``seconds``: what it should take on one H200, cold. ``tests``: the targets it answers."""

    name: str
    seconds: float
    run: Callable[[Session], Iterator[Outcome]]


def one_row(session: Session) -> Iterator[Outcome]:
    """Batch 1: overhead, nothing to win, long and longest, tokens a second."""
    sizes = session.sizes
    lengths = (sizes.budget, sizes.short, sizes.long, sizes.longest)
    entries = [
        *(session.full(length, 1) for length in lengths),
        *(session.policy(name, 1) for name in (SCORED, *OTHERS)),
    ]
    rows = session.race(entries, "batch 1")
    for row in (rows[name] for name in (SCORED, *OTHERS)):
        said = f"{row.label}, batch 1"
        yield _ratio(row, sizes.budget, f"{said}: against a full cache of the budget's size, {sizes.budget:,}", 0.95)
        yield _ratio(row, sizes.short, f"{said}: {sizes.short:,} tokens, nothing to win", 0.95)
        yield _ratio(row, sizes.long, f"{said}: {sizes.long:,} tokens", 1.15)
        yield _ratio(row, sizes.longest, f"{said}: {sizes.longest:,} tokens", 1.8)
        ideal = session.track.bandwidth / row.step_bytes
        yield Outcome(f"{said}: tokens a second", ideal, 190, row.tokens_per_second, "tokens/s", _substance(row))


def many_rows(session: Session) -> Iterator[Outcome]:
    """A large batch: overhead, and the triton backend against the compiled torch backend."""
    sizes = session.sizes
    entries = [session.full(sizes.budget, sizes.many), session.policy(SCORED, sizes.many),
               session.policy(SCORED, sizes.many, backend="torch")]  # fmt: skip
    rows = session.race(entries, f"batch {sizes.many}")
    own, torch_row = rows[SCORED], rows[f"{SCORED}, torch"]
    said = f"{SCORED}, batch {sizes.many}"
    yield _ratio(own, sizes.budget, f"{said}: against a full cache of the budget's size", 0.90)
    yield Outcome(
        f"{said}: backend {own.backend} against the compiled torch backend", None, 1.2, torch_row.ms / own.ms,
        note="" if own.backend == "triton" else "the triton backend did not run",
    )  # fmt: skip


def long_rows(session: Session) -> Iterator[Outcome]:
    """Some rows at the long context."""
    sizes = session.sizes
    for batch, must in ((sizes.few, 2.3), (sizes.some, 3.4)):
        entries = [session.full(sizes.long, batch), session.policy(SCORED, batch, length=sizes.long)]
        rows = session.race(entries, f"batch {batch}")
        yield _ratio(rows[SCORED], sizes.long, f"{SCORED}, batch {batch}: {sizes.long:,} tokens", must)


def transformers_caches(session: Session) -> Iterator[Outcome]:
    """Transformers' own caches at a few long rows: compiled StaticCache, then DynamicCache."""
    sizes, track = session.sizes, session.track
    for name in ("hf-static", "hf-dynamic"):
        entries = [session.full(sizes.long, sizes.few, name), session.policy(SCORED, sizes.few, length=sizes.long)]
        rows = session.race(entries, f"{name}, batch {sizes.few}")
        row, other = rows[SCORED], rows[name]
        why = "; ".join(other.notes) or f"{'compiled' if other.compiled else 'eager'}"
        yield Outcome(
            f"{SCORED}, batch {sizes.few}: {sizes.long:,} tokens, against {name}", row.ideal[name], None,
            row.ratios[name], note=f"{name}: {why}; it uses {other.roofline:.0%} of the bandwidth, as counted",
        )  # fmt: skip
        track.forget()


def sequences(session: Session) -> Iterator[Outcome]:
    """How many sequences fit beside the weights at the long context, by the plan, and allocated to see that they do."""
    sizes, track = session.sizes, session.track
    memory = sizes.memory or int(torch.cuda.get_device_properties(track.device).total_memory)
    room = int(memory * USABLE) - track.model_bytes
    full = session.full(sizes.long, 1).case
    policy = session.policy(SCORED, 1).case
    fits = {label: room // case.plan.bytes for label, case in (("dense", full), (SCORED, policy))}
    notes = []
    for label, case in (("dense", full), (SCORED, policy)):
        plan = _batched(case, fits[label])
        notes.append(f"{label}: {fits[label]:,} rows, {_allocated(track, plan)}")
        session.capacities.append({"label": label, "batch": fits[label], "bytes": plan.bytes, "memory": memory})
    yield Outcome(
        f"sequences that fit at {sizes.long:,} tokens", sizes.long / sizes.budget, 12.0, fits[SCORED] / fits["dense"],
        note="; ".join(notes),
    )  # fmt: skip


JOBS = (
    Job("batch 1", 150, one_row),
    Job("long contexts", 90, long_rows),
    Job("a large batch", 70, many_rows),
    Job("sequences that fit", 15, sequences),
    Job("transformers' caches", 100, transformers_caches),
)


def _batched(case: Case, batch: int) -> Plan:
    plan = case.plan
    policy: Policy = case.policy
    return make_plan(policy, plan.geometry, batch=batch, prompt=plan.prompt, max_new_tokens=plan.max_new_tokens)


def _allocated(track: Track, plan: Plan) -> str:
    """Allocate a cache, look, and give it back."""
    try:
        with measured(track.device) as usage:
            cache = PolicyCache(plan, device=track.device, backend=track.backend)
    except (torch.OutOfMemoryError, UsageError) as error:
        return f"which could not be allocated ({str(error).splitlines()[0]})"
    del cache
    track.forget()
    return f"{gigabytes(usage.kept)} allocated, {gigabytes(plan.bytes)} planned"


def _ratio(row: Row, length: int, test: str, must: float) -> Outcome:
    reference = f"dense, {length:,}"
    return Outcome(test, row.ideal[reference], must, row.ratios[reference], note=_substance(row))


def _substance(row: Row) -> str:
    launched = "" if row.launches_per_layer is None else f", {row.launches_per_layer:.1f} launches a layer"
    return f"{row.ms:.2f} ms, {row.roofline:.0%} of the bandwidth{launched}, {row.backend}"
