"""The processes that torchrun or `accelerate launch` started: which of them this is, and how they keep together.

Both say it in the environment. A command that runs on all of them speaks on the first alone, and whatever one of them
decides for itself, an error among it, the others must know: a rank that goes its own way leaves the rest waiting.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvpolicy.errors import KvpolicyError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """``count`` processes of one launch; this one is ``rank`` of all, and ``local`` on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this one speaks for all."""
        return self.rank == 0

    def join(self) -> None:
        """Meet the others, once; on a machine with GPUs each process takes the one of its number."""
        if self.count == 1 or self.met:
            return
        import torch
        import torch.distributed as dist

        if torch.cuda.is_available():
            torch.cuda.set_device(self.local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    @property
    def met(self) -> bool:
        """Whether it has met the others, by ``join`` or because somebody else saw to it."""
        distributed = sys.modules.get("torch.distributed")
        return distributed is not None and bool(distributed.is_initialized())

    def leave(self) -> None:
        """Part from the others, so that torch does not complain of it at the end."""
        if self.met:
            import torch.distributed as dist

            dist.destroy_process_group()

    def collect(self, value: Result) -> list[Result]:
        """What each process has to say, any picklable value, in order. All must call it."""
        if self.count == 1:
            return [value]
        self.join()
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process. All must call it."""
        return any(self.collect(flag))

    def told(self, work: Callable[[], Result]) -> Result:
        """What the work gives the first process, in all of them; it runs there alone. Its error is raised in all."""
        return self.spread([0], lambda _: work())[0]

    def spread(self, items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
        """``work(item)`` for every item, in order; each process does every so many of them, and all get all results.

        Raises:
            KvpolicyError: the first that any of them raised, in all of them.
        """
        if self.count == 1:
            return [work(item) for item in items]
        done: list[tuple[int, Result | None, KvpolicyError | None]] = []
        for number in range(self.rank, len(items), self.count):
            try:
                done.append((number, work(items[number]), None))
            except KvpolicyError as fault:
                done.append((number, None, fault))
                break
        found = {number: (result, fault) for each in self.collect(done) for number, result, fault in each}
        faults = [fault for _, (_, fault) in sorted(found.items(), key=lambda entry: entry[0]) if fault is not None]
        if faults:
            raise faults[0]
        return [found[number][0] for number in range(len(items))]  # type: ignore[misc]

    def says(self, text: str) -> bool:
        """Whether this process is to say a sentence that others may have to say as well: one of them does."""
        if self.count == 1:
            return True
        if not self.met:  # nothing happened yet that could differ, but between machines
            return self.local == 0
        import torch.distributed as dist

        try:
            key = hashlib.sha256(text.encode()).hexdigest()
            return bool(dist.distributed_c10d._get_default_store().add(f"kvpolicy/{key}", 1) == 1)
        except Exception:  # whoever kept the list is gone; better twice than never
            return True


def processes() -> Processes:
    """Those of this launch; one where there was none. One variable alone may mean something else: all must be set."""
    try:
        rank, count, local = (int(os.environ[name]) for name in VARIABLES[:3])
    except (KeyError, ValueError):
        return Processes()
    return Processes(rank, count, local) if all(os.environ.get(name) for name in VARIABLES) else Processes()
