"""Search for counter-examples: python -m kvpolicy.lab.fuzz --cases 20000 --texts 200000 --seed 0

Cases are random policies under random attention, through the runtime with the oracle beside it; texts are mutated YAML
for the loader. A counter-example is shrunk, printed as a YAML file that `kvpolicy test --runtime` fails on, and written
to the folder of --failures. The same seed draws the same cases, however many workers there are.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

CHUNK = 100
"""Cases that a worker takes at a time."""

WHOLE = 10
"""To so many cases that the runtime runs comes one from the whole language, which it may refuse: the oracle runs it."""

JUDGED = 5000
"""From so many cases on, a feature that was never drawn is a failure."""


def main(arguments: list[str] | None = None) -> int:
    """Run the search; 1 where a counter-example was found, or a feature was never drawn."""
    parser = argparse.ArgumentParser(prog="python -m kvpolicy.lab.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20000, help="cases that runtime and oracle must agree on")
    parser.add_argument("--texts", type=int, default=200000, help="mutated texts through the loader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--compile-every", type=int, default=500, help="one case in so many is compiled; 0: none")
    parser.add_argument("--case", type=int, help="only this case")
    parser.add_argument("--whole", action="store_true", help="--case counts cases of the whole language")
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz"), help="where counter-examples are written")
    given = parser.parse_args(arguments)
    if given.case is not None:
        given.cases, given.texts, given.workers = 1, 0, 1
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers
    failures = search_cases(given) if given.cases else []
    failures += read_texts(given) if given.texts else []
    for number, failure in enumerate(failures):
        given.failures.mkdir(parents=True, exist_ok=True)
        path = given.failures / f"seed{given.seed}_{number}.yaml"
        path.write_text(failure, encoding="utf-8")
        print(f"\n--- counter-example {number}, written to {path}\n{failure}")
    print(f"\n{len(failures)} counter-examples" if failures else "\nno counter-examples")
    return 1 if failures else 0


def search_cases(given: argparse.Namespace) -> list[str]:
    """The agreement search; returns its failures."""
    from kvpolicy.lab.fuzz.cases import Chunk, Found, search

    def chunks(cases: range, supported: bool) -> Iterator[Chunk]:
        for first in cases[::CHUNK]:
            count = min(CHUNK, cases.stop - first)
            yield Chunk(first, count, given.seed, supported, given.compile_every if supported else 0)

    if given.case is not None:
        every = list(chunks(range(given.case, given.case + 1), not given.whole))
    else:
        whole = -(-given.cases // WHOLE)
        every = [*chunks(range(given.cases), True), *chunks(range(whole), False)]
        print(f"cases 0..{given.cases - 1} of what the runtime runs and 0..{whole - 1} of the whole language", end="")
        print(f", seed {given.seed}, {given.workers} workers", flush=True)
    planned = sum(chunk.count for chunk in every)
    total, start, done = Found(), time.monotonic(), 0
    for chunk, found in zip(every, spread(search, every, given.workers), strict=True):
        total.add(found)
        done += chunk.count
        progress(f"{done} drawn, {total.agreed} agreed, {len(total.failures)} failed", start, done / planned)
        if len(total.failures) >= 5:
            print("stopping after five counter-examples")
            break
    seconds = time.monotonic() - start
    print(
        f"{total.agreed} cases agreed ({len(total.distinct)} of {done} drawn are distinct) in {seconds:.0f} s", end=""
    )
    print(f", {total.agreed / max(seconds, 0.1):.1f} a second; in {total.evicting} of them something was evicted")
    print(f"{total.compared} kept sets compared, {total.evicted} tokens evicted, {total.compiled} compiled too", end="")
    print(f"; {total.wasted} draws were no valid policy")
    print(f"{total.near_ties} near ties that float32 cannot tell apart; some of them:")
    for tie in total.ties[:10]:
        print(f"  {tie}")
    print("refused politely, by reason:")
    for reason, count in total.refused.most_common():
        print(f"{count:>7}  {reason}")
    return total.failures + judged(total.drawn, given.cases)


def judged(drawn: Counter[str], cases: int) -> list[str]:
    """Print the coverage of features; what was never drawn is a failure of the search itself."""
    from kvpolicy.lab.fuzz.coverage import every_feature, table

    print("features of the language and of texts, and in how many cases they were drawn:")
    print(table(drawn))
    never = sorted(every_feature() - drawn.keys())
    if never:
        print(f"never drawn: {', '.join(never)}")
    return [f"features never drawn: {', '.join(never)}\n"] if never and cases >= JUDGED else []


def read_texts(given: argparse.Namespace) -> list[str]:
    """The loader's part; returns its failures."""
    from kvpolicy.lab.fuzz.bytes import Batch, Read, read_batch

    size = 2000
    every = [Batch(number, min(size, given.texts - number), given.seed) for number in range(0, given.texts, size)]
    total, start = Read(), time.monotonic()
    for batch, read in zip(every, spread(read_batch, every, given.workers), strict=True):
        total.add(read)
        progress(f"{total.texts} texts", start, (batch.first + batch.count) / given.texts)
    print(f"{total.texts} mutated texts, seed {given.seed}: {total.loaded} load, {total.refused} are refused", end="")
    print(f" with {total.diagnostics} diagnostics, in {time.monotonic() - start:.0f} s")
    print(f"slowest {total.slowest:.2f} s, most memory {total.most_bytes / 2**20:.1f} MiB over what was there before")
    return total.failures


def spread(work: Callable[[Any], T], items: Iterable[Any], workers: int) -> Iterator[T]:
    """Results in order, from so many processes."""
    if workers <= 1:
        yield from map(work, items)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(work, items)


def progress(what: str, start: float, share: float) -> None:
    """One line, overwritten on a terminal."""
    spent = time.monotonic() - start
    left = spent / max(share, 1e-9) - spent
    line = f"{share:4.0%}  {what}, {spent:.0f} s, about {left:.0f} s left"
    if sys.stderr.isatty():
        print(f"\r{line:<100}", end="" if share < 1 else "\n", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
