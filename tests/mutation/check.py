"""Is every deliberately broken copy of the runtime caught, and by what? `python -m tests.mutation.check`.

Each mutant lives in a forked process that imports the runtime anew, with the change in its source. There the shipped
policies and random cases run beside the oracle until one disagrees, and rows are reordered under one of them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import multiprocessing
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import yaml

import kvpolicy
from tests.mutation.mutants import MUTANTS, Mutant

FOUND = Path(__file__).parents[1] / "runtime" / "found"
"""What the search once found."""

CASES = 300
"""Random cases after which a mutant has survived."""

SHIPPED = {
    "raas": {"budget": 20, "page_size": 4},
    "h2o": {"heavy": 6, "recent": 3},
    "tova": {"budget": 9},
    "scope-slide": {"alpha": 8, "alpha2": 2, "beta1": 5, "beta2": 3},
    "ada-kv": {"budget": 8, "window": 1, "kernel": 1},
}
SAID = {"pattern": "uniform", "noise": 2.0, "prompt": [11, 4], "steps": 20, "layers": 2, "heads": 4, "kv_heads": 2}
FLAGGED = """
kvpolicy: 1
name: flagged
pools:
  marks: {admit: {tokens: special}, page: 4}
  images: {admit: {modality: image}, page: 2, budget: 4, scorer: {signal: attention, queries: all}, update: prompt-end}
  rest:
    admit: all
    page: 4
    budget: 8
    pinned: {tokens: special}
    scorer: {signal: page-bound, hit: {top: 50%}, memory: last-hit}
"""
PINNED = """
kvpolicy: 1
name: pinned
pools:
  all: {admit: all, page: 2, budget: 6, pinned: {tokens: special}, scorer: {signal: attention}}
"""
CHUNKED = """
kvpolicy: 1
name: chunked
prompt_chunk: 8
positions: compact
pools:
  all: {admit: all, page: 3, budget: 'max(6, 18 - prompt_len)', scorer: {signal: attention, queries: {last: 3}}}
"""
FLAGS = {"special": [0, 6], "images": ["1..3", 9]}


class Result(NamedTuple):
    """What caught a mutant (empty: nothing did), after how many cases and seconds."""

    caught_by: str
    cases: int
    seconds: float


class Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module with a change in its source."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        # Not by importlib: that would import the package around it, and the module with it, unchanged.
        self.path = str(Path(kvpolicy.__file__).parents[1].joinpath(*mutant.module.split(".")).with_suffix(".py"))

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, origin=self.path) if name == self.mutant.module else None

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        return changed_source(self.mutant, Path(self.path).read_text(encoding="utf-8")).encode()


def changed_source(mutant: Mutant, source: str) -> str:
    """The source with the change. Raises ValueError unless the fragment is there exactly once."""
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.module} has {source.count(mutant.old)} of: {mutant.old!r} ({mutant.breaks})")
    return source.replace(mutant.old, mutant.new)


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, policy and text: shipped policies, flagged tokens, chunks, what the search once found, then random ones."""
    from kvpolicy.language import load_policy
    from kvpolicy.testing.shrinking import Choices
    from kvpolicy.testing.strategies.policies import draw_policy
    from kvpolicy.testing.strategies.texts import draw_text

    for name, params in SHIPPED.items():
        yield name, load_policy(name, params).to_yaml(), SAID
    for name, policy in (("shared out", FLAGGED), ("pinned", PINNED)):
        yield name, policy, {**SAID, **FLAGS}
    yield "chunked", CHUNKED, SAID
    # Prompts are scored in tiles of 32 queries a thread: this one needs several.
    yield "in tiles", load_policy("h2o", SHIPPED["h2o"]).to_yaml(), {**SAID, "prompt": [70, 4]}
    for path in sorted(FOUND.glob("*.yaml")):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        for test in document.pop("tests"):
            yield path.stem, yaml.safe_dump(document, sort_keys=False), test["attention"]
    for number in range(CASES):
        choices = Choices(random=random.Random(f"mutants/{number}"))
        policy = draw_policy(choices, supported=True)
        if policy is not None:
            yield f"random case {number}", policy, draw_text(choices)


def hunt(mutant: Mutant | None, most: int = CASES) -> Result:
    """Run cases in this process, with the runtime not yet imported, until one tells the mutant from the runtime."""
    assert not any(name.startswith(("kvpolicy.runtime", "kvpolicy.scorers")) for name in sys.modules)
    if mutant is not None:
        sys.meta_path.insert(0, Changed(mutant))
    import torch

    from kvpolicy.testing.search import agree

    torch.set_num_threads(1)
    start = time.monotonic()
    number = 0
    for number, (name, policy, text) in enumerate(islice(cases(), most), 1):
        try:
            agree(policy, text)
            if name in SHIPPED:
                reordered(policy, text)
        except Exception as error:
            why = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else traceback.format_exc()
            )
            return Result(f"{name}: {why}", number, time.monotonic() - start)
    return Result("", number, time.monotonic() - start)


def reordered(policy: str, text: dict[str, Any]) -> None:
    """Rows that change places in the middle keep what they would have kept: the cache moves all that they are."""
    from kvpolicy.language import loads_policy
    from kvpolicy.testing.feeding import RuntimeBeside, passes, plan_for
    from kvpolicy.testing.patterns import Attention, synthesize

    said = synthesize(text)
    turned = Attention(said.prompts[::-1], said.steps, said.queries[::-1], said.keys[::-1], said.values[::-1])
    plan = plan_for(loads_policy(policy), said)
    plain, moved = RuntimeBeside(plan), RuntimeBeside(plan)
    for number, now in enumerate(passes(said, None)):
        plain.feed(said, now)
        if number < 9:
            moved.feed(said, now)
            continue
        if number == 9:
            import torch

            moved.beside.cache.reorder_cache(torch.tensor([1, 0]))
            for rows in moved.beside.agreement.oracle.layers:
                rows.reverse()
                for row, layer in enumerate(rows):
                    layer.row = row
        moved.feed(turned, type(now)(now.kind, now.rows[::-1], now.more))


def work(number: int | None, answer: Any) -> None:
    try:
        answer.send(hunt(None, 20) if number is None else hunt(MUTANTS[number]))
    except BaseException:
        answer.send(traceback.format_exc())


def check(chosen: Sequence[int]) -> Iterator[tuple[Mutant, Result]]:
    """The mutants of these numbers, each in a process of its own. What all of them share is imported once, before."""
    import transformers.generation.utils  # noqa: F401

    context = multiprocessing.get_context("fork")
    for number in (None, *chosen):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(number, send))
        process.start()
        result = receive.recv()
        process.join()
        if isinstance(result, str):
            raise RuntimeError(result)
        if number is not None:
            yield MUTANTS[number], result
        elif result.caught_by:
            raise RuntimeError(f"the unchanged runtime disagrees with the oracle: {result.caught_by}")


def main() -> int:
    """Print the list and what caught each; 1 if one survived."""
    survivors, chosen = 0, [int(number) for number in sys.argv[1:]] or range(len(MUTANTS))
    for mutant, result in check(chosen):
        place = mutant.module.removeprefix("kvpolicy.")
        how = f"caught after {result.cases:>3} cases, {result.seconds:4.1f} s by {result.caught_by}"
        print(f"{place:<24} {mutant.breaks}\n    {how if result.caught_by else 'SURVIVED'}", flush=True)
        survivors += not result.caught_by
    print(f"{len(chosen)} broken copies of the runtime, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
