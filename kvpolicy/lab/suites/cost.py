"""What a step costs as the output grows: time and memory against the full cache, measured in turn in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from kvpolicy.errors import KvpolicyError
from kvpolicy.lab.bench.cases import WARM
from kvpolicy.lab.bench.measuring import Bench, Subject
from kvpolicy.lab.bench.measuring import Options as BenchOptions
from kvpolicy.lab.bench.rows import Row
from kvpolicy.lab.bench.tables import Table
from kvpolicy.lab.compare.arms import FULL, Arm
from kvpolicy.lab.panels import Axis, Panel, Point, dressed
from kvpolicy.lab.suites.base import Experiment, Found, Lab, Rows, Tell, append_row, read_rows
from kvpolicy.lab.suites.claims import Finding, Word

LENGTHS = (512, 1024, 2048, 4096)
"""Tokens of the text after its last step, the prompt's among them."""

PROMPT = 128
"""Tokens of the prompt, as in RaaS's runs; full caches are filled up with random numbers."""

BUDGET = 256
"""Tokens that policies hold."""

STEPS, ROUNDS = 24, 6
"""Steps that are timed for each arm and length, and the turns that arms take."""

SLACK = 0.1
"""A time or a size that changes by no more than this part is as good as flat."""


@dataclass(frozen=True)
class Cost(Experiment):
    """Steps and bytes by length. ``arms``: policies, whose budgets are left aside for ``BUDGET``.

    flat: series of which the paper says that neither time nor memory grows with the text once the budget is full.
    """

    name: str
    title: str
    paper: str
    arms: Callable[[Lab], Sequence[Arm]]
    flat: tuple[str, ...]
    same: str | None = None

    def measure(self, lab: Lab, path: Path, known: Sequence[Path], tell: Tell) -> list[str]:
        most = getattr(lab.model.config, "max_position_embeddings", None) or LENGTHS[-1]
        done = {(row["context"], row["model"], row["dtype"]) for row in read_rows(path)}
        dtype = str(lab.model.dtype).removeprefix("torch.")
        lengths = [length for length in LENGTHS if length <= most]
        refused = []
        if left := [length for length in LENGTHS if length > most]:
            refused.append(
                f"this model knows {most:,} positions, so nothing was timed at {left[0]:,} tokens and beyond"
            )
        for number, length in enumerate(lengths):
            if (length, lab.name, dtype) in done:
                continue
            tell(number, len(lengths), f"{self.name}: {length:,} tokens")
            for arm in self.arms(lab):
                try:
                    rows = self._run(lab, arm, length)
                except KvpolicyError as error:
                    refused.append(f"{arm.label} at {length:,} tokens: {str(error).splitlines()[0]}")
                    continue
                for row in rows:
                    append_row(path, {"kvpolicy_cost": 1, "model": lab.name, "dtype": dtype, **row})
        tell(len(lengths), len(lengths), "done")
        return refused

    def _run(self, lab: Lab, arm: Arm, length: int) -> list[dict[str, Any]]:
        """One policy beside the full cache, which takes turns with it."""
        how = BenchOptions(
            [length], [BUDGET], steps=STEPS, rounds=ROUNDS, prompt=PROMPT, against=("dense",), launches=False,
            compile=lab.options.compile,
        )  # fmt: skip
        bench = Bench(lab.model, [Subject(arm.label, arm.policy, arm.given)], how)
        return [_facts(row, bench.model_bytes) for row in bench.run(lab.name).rows]

    def tell(self, rows: Rows) -> Found:
        lengths = sorted({row["context"] for row in rows})
        names = list(dict.fromkeys(row["label"] for row in rows if row["label"] != FULL))
        curves = {name: _curve(rows, name) for name in names}
        return Found(
            [_table(curves, rows)],
            [
                _panel("Time of all steps, of the full cache’s", curves, lengths, lambda each: each["time"]),
                _panel("Memory of the cache, of the full cache’s", curves, lengths, lambda each: each["memory"]),
            ],
            findings=[found for name in self.flat if name in curves for found in _flat(name, curves[name])],
            doubts=list(_doubts(rows)),
            upright="times the full cache’s",
        )


def _facts(row: Row, model_bytes: int) -> dict[str, Any]:
    """What is kept of a row of bench: milliseconds, and bytes of the cache alone."""
    return {
        "label": row.label, "context": row.context, "budget": row.budget, "held": row.held, "settings": row.settings,
        "ms": row.ms, "ratio": row.ratios.get("dense"), "bytes": row.planned_bytes - model_bytes,
        "allocated_bytes": row.allocated_bytes - model_bytes, "compiled": row.compiled, "evicted": row.evicted,
    }  # fmt: skip


def _curve(rows: Rows, name: str) -> dict[int, dict[str, float]]:
    """By length: a step's and all steps' time, and the cache's bytes, as multiples of the full cache's."""
    own = {row["context"]: row for row in rows if row["label"] == name}
    full = {row["context"]: row for row in rows if row["label"] == FULL}
    found: dict[int, dict[str, float]] = {}
    spent = base = 0.0
    before = PROMPT
    for length in sorted(own):
        step = 1 / own[length]["ratio"]
        full_ms = own[length]["ms"] / step
        steps = length - before
        spent, base, before = spent + own[length]["ms"] * steps, base + full_ms * steps, length
        found[length] = {
            "step": step,
            "time": spent / base,
            "memory": own[length]["bytes"] / full[length]["bytes"],
            "bytes": own[length]["bytes"],
            "ms": own[length]["ms"],
            "full_ms": full_ms,
        }
    return found


def _panel(caption: str, curves: Any, lengths: Sequence[int], of: Callable[[dict[str, float]], float]) -> Panel:
    lines = []
    for number, (name, curve) in enumerate(curves.items()):
        points = [
            Point(lengths.index(length), of(each), of(each), of(each), f"{name}, {length:,} tokens: {of(each):.2f}")
            for length, each in curve.items()
        ]
        lines.append(dressed(name, number, points))
    top = ceil(2 * max([1.0, *(point.value for line in lines for point in line.points)])) / 2
    places = tuple(f"{length:,}" for length in lengths)
    full, axis = Point(0, 1.0, 1.0, 1.0), Axis(top=top, shares=False)
    return Panel(
        caption, f"{caption}; the line: the full cache", places, "tokens of the text", tuple(lines), full, axis
    )


def _table(curves: Any, rows: Rows) -> Table:
    columns = ["", "text", "ms a step", "full cache", "a step, ×", "all steps, ×", "cache KiB", "memory, ×"]
    lines = [
        [
            name, f"{length:,}", f"{each['ms']:.2f}", f"{each['full_ms']:.2f}", f"{each['step']:.2f}",
            f"{each['time']:.2f}", f"{each['bytes'] / 1024:,.0f}", f"{each['memory']:.3f}",
        ]
        for name, curve in curves.items()
        for length, each in curve.items()
    ]  # fmt: skip
    return Table(f"A step and the cache by length of the text, budget {BUDGET}; × of the full cache", columns, lines)


def _flat(name: str, curve: dict[int, dict[str, float]]) -> Iterator[Finding]:
    """Whether, once the budget is full, memory stays and a step becomes cheaper against the full cache's. Times of
    several lengths were not measured at once, so that only their ratios are held against one another."""
    lengths = [length for length in sorted(curve) if length > 2 * BUDGET]
    if len(lengths) < 2:
        yield Finding(f"{name}: memory does not grow with the text", Word.OPEN, "Too few lengths were measured.")
        return
    first, last = curve[lengths[0]], curve[lengths[-1]]
    span = f"From {lengths[0]:,} to {lengths[-1]:,} tokens"
    grown = last["bytes"] / first["bytes"] - 1
    word = Word.HOLDS if grown <= SLACK else Word.FAILS
    yield Finding(f"{name}: memory does not grow with the text", word, f"{span}: {grown:+.0%}.")
    change = last["step"] / first["step"] - 1
    word = Word.HOLDS if change < -SLACK else Word.FAILS if change > SLACK else Word.OPEN
    yield Finding(
        f"{name}: the longer the text, the cheaper a step against the full cache's",
        word,
        f"{span}: from {first['step']:.2f} to {last['step']:.2f} of its time; within {SLACK:.0%} is as good as equal.",
    )


def _doubts(rows: Rows) -> Iterator[str]:
    if not any(row["compiled"] for row in rows):
        yield (
            "nothing is compiled here: a step of a small model waits for Python and launches, whose number does not "
            "depend on the length, so that there is less to win than bytes would give (docs/bench.md)"
        )
    if len({row["context"] for row in rows}) < 2:
        yield f"fewer than two lengths were measured, and a step needs {WARM} before it is timed"
