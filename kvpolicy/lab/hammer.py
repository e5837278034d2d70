"""Threads that hammer one patched model, each with caches of its own: every answer must equal the one it has alone.

    python -m kvpolicy.lab.hammer                              # ten minutes, two threads, eager
    python -m kvpolicy.lab.hammer --compile inductor --seconds 120

The jobs are calls that a server would make: stock `generate`, our decode loop, turns on one cache, and the model's own
cache in between, at several lengths and padded batches. Each is first run alone, on a copy of the model. Then threads
draw jobs at random; every round takes the policy off and applies it anew, so that first calls meet too. Exit code 1 at
the first answer that differs, or an error.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvpolicy.language import Policy, loads_policy
from kvpolicy.patching import apply, cache_for, remove
from kvpolicy.runtime import decode_loop
from kvpolicy.testing.models import random_model

POLICY = """
kvpolicy: 1
name: hammered
params: {budget: {default: 12, help: tokens kept of what was generated}}
pools:
  prompt:
    admit: prompt
    budget: 8
    window: 2
    scorer: {signal: attention, queries: all, memory: sum}
    update: prompt-end
  generated:
    admit: generated
    budget: budget
    window: 2
    scorer: {signal: attention, memory: sum}
    update: {every: 4}
"""

Answer = tuple[Tensor, ...]


@dataclass(frozen=True)
class Job:
    """One call: ``way`` says how the model is called, ``rows`` are the prompts' lengths, ``seed`` their text."""

    way: str
    rows: tuple[int, ...]
    new: int
    seed: int

    def run(self, model: Any) -> Answer:
        """The tokens, and of a cache by hand what every layer kept."""
        return tuple(getattr(self, f"_{self.way}")(model))

    def _inputs(self) -> dict[str, Tensor]:
        longest = max(self.rows)
        ids = torch.randint(2, 97, (len(self.rows), longest), generator=torch.Generator().manual_seed(self.seed))
        mask = (torch.arange(longest) >= longest - torch.tensor(self.rows)[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask}

    def _generate(self, model: Any) -> list[Tensor]:
        return [model.generate(**self._inputs(), do_sample=False, max_new_tokens=self.new)]

    def _loop(self, model: Any) -> list[Tensor]:
        options = {"do_sample": False, "max_new_tokens": self.new, "custom_generate": decode_loop}
        return [model.generate(**self._inputs(), **options)]

    def _own(self, model: Any) -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        return [model.generate(**self._inputs(), do_sample=False, max_new_tokens=self.new, past_key_values=cache)]

    def _turns(self, model: Any) -> list[Tensor]:
        inputs, rows = self._inputs(), len(self.rows)
        lengths = (min(self.rows), max(self.rows) + 5)
        cache = cache_for(model, prompt=lengths, max_new_tokens=2 * self.new, batch=rows, turns=2)
        text = model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=self.new)
        more = torch.randint(2, 97, (rows, 4), generator=torch.Generator().manual_seed(self.seed + 1))
        whole = torch.cat([text, more], dim=1)
        seen = whole.shape[1] - inputs["attention_mask"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(rows, seen, dtype=torch.long)], dim=1)
        said = {"input_ids": whole, "attention_mask": mask, "past_key_values": cache}
        text = model.generate(**said, do_sample=False, max_new_tokens=self.new)
        return [text, *(cache.positions(layer).clone() for layer in range(len(cache.layers)))]


def jobs(count: int = 16, seed: int = 0) -> list[Job]:
    """Jobs of every way, at few shapes, so that threads meet in them."""
    draw, ways = random.Random(seed), [name[1:] for name in ("_generate", "_loop", "_own", "_turns")]
    shapes = [(9,), (30,), (24, 11, 17)]
    return [Job(ways[at % len(ways)], draw.choice(shapes), draw.choice((12, 40)), at) for at in range(count)]


@dataclass
class Hammer:
    """``threads`` threads on one model for a while; what went wrong is in ``wrong``, what was answered in ``done``."""

    model: Any
    policy: Policy
    compile: bool | str = False
    threads: int = 2
    wrong: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def expected(self, all_jobs: list[Job]) -> dict[Job, Answer]:
        """Every job alone, on a copy of the model."""
        alone = apply(copy.deepcopy(self.model), self.policy, compile=self.compile)
        return {job: job.run(alone) for job in all_jobs}

    def round(self, answers: dict[Job, Answer], seconds: float, seed: int) -> None:
        """Apply, hammer, remove."""
        apply(self.model, self.policy, compile=self.compile)
        stop = time.monotonic() + seconds
        workers = [
            threading.Thread(target=self._work, args=(answers, stop, 1000 * seed + at)) for at in range(self.threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        remove(self.model)

    def _work(self, answers: dict[Job, Answer], stop: float, seed: int) -> None:
        draw, all_jobs = random.Random(seed), list(answers)
        while time.monotonic() < stop and not self.wrong:
            job = draw.choice(all_jobs)
            try:
                got = job.run(self.model)
            except Exception:
                self.wrong.append(f"{job} failed:\n{traceback.format_exc()}")
                return
            if not all(map(torch.equal, got, answers[job])):
                self.wrong.append(f"{job} answered otherwise than alone")
            self.done[job.way] += 1


def hammer(
    seconds: float, *, threads: int = 2, compile: bool | str = False, round_seconds: float = 30, seed: int = 0
) -> Hammer:
    """Rounds of at most ``round_seconds`` until ``seconds`` are over or something went wrong."""
    found = Hammer(random_model(seed=seed), loads_policy(POLICY, filename="hammered"), compile, threads)
    answers = found.expected(jobs(seed=seed))
    stop, number = time.monotonic() + seconds, 0
    while time.monotonic() < stop and not found.wrong:
        found.round(answers, min(round_seconds, stop - time.monotonic()), number)
        number += 1
    return found


def main() -> int:
    """Hammer and tell; returns 1 where an answer differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", help="a backend of torch.compile; by default steps are eager")
    parser.add_argument("--round", type=float, default=30, help="seconds after which the policy is applied anew")
    options = parser.parse_args()
    compiled = options.compile or False
    found = hammer(options.seconds, threads=options.threads, compile=compiled, round_seconds=options.round)
    told = ", ".join(f"{count} x {way}" for way, count in sorted(found.done.items()))
    print(f"{sum(found.done.values())} answers in {options.threads} threads: {told}")
    for line in found.wrong:
        print(line, file=sys.stderr)
    return int(bool(found.wrong))


if __name__ == "__main__":
    sys.exit(main())
