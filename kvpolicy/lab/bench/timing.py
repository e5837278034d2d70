"""Times of steps, taken in turn: whatever else the machine does falls on every arm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass
class Steps:
    """Seconds of single steps, each with its kind."""

    seconds: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def add(self, seconds: float, kind: str) -> None:
        self.seconds.append(seconds)
        self.kinds.append(kind)

    def since(self, number: int) -> Steps:
        """The steps from one on."""
        return Steps(self.seconds[number:], self.kinds[number:])

    @property
    def by_kind(self) -> dict[str, float]:
        """Median milliseconds of each kind of step."""
        return {
            kind: 1e3 * statistics.median(s for s, k in zip(self.seconds, self.kinds, strict=True) if k == kind)
            for kind in dict.fromkeys(self.kinds)
        }

    @property
    def ms(self) -> float:
        """Milliseconds of a step: the medians of its kinds, each as often as it came. The median of all would leave an
        update out that comes with every sixteenth step."""
        return sum(self.by_kind[kind] for kind in self.kinds) / len(self.kinds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of all steps, in milliseconds."""
        if len(self.seconds) < 2:
            return (1e3 * self.seconds[0],) * 2
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return 1e3 * first, 1e3 * third


class Timed(Protocol):
    """What can take its turn."""

    steps: Steps

    def step(self) -> str:
        """Run one step, and say of what kind it was."""

    def rewind(self, count: int) -> None:
        """Undo what the last ``count`` steps added, where a cache would grow."""


def take_turns(
    arms: Sequence[Timed], device: torch.device, *, rounds: int, block: int, tell: Callable[[int], None]
) -> None:
    """Time ``rounds`` blocks of ``block`` steps of every arm, in turn; ``tell`` hears how many rounds are done."""
    run = _block_on_gpu if device.type == "cuda" else _block_on_cpu
    for done in range(rounds):
        for arm in arms:
            for seconds, kind in run(arm, block):
                arm.steps.add(seconds, kind)
            arm.rewind(block)
        tell(done + 1)


def _block_on_cpu(arm: Timed, block: int) -> list[tuple[float, str]]:
    taken = []
    for _ in range(block):
        start = time.perf_counter()
        kind = arm.step()
        taken.append((time.perf_counter() - start, kind))
    return taken


def _block_on_gpu(arm: Timed, block: int) -> list[tuple[float, str]]:
    """Steps follow one another as in a decode loop, without waiting for the device in between; one wait at the end."""
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(block + 1)]
    kinds = []
    marks[0].record()
    for mark in marks[1:]:
        kinds.append(arm.step())
        mark.record()
    torch.cuda.synchronize()
    return [(a.elapsed_time(b) / 1e3, kind) for a, b, kind in zip(marks[:-1], marks[1:], kinds, strict=True)]


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes, the device's part included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
