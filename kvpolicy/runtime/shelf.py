"""One cache kept between two calls of `generate`, with what was recorded on it: the next call of like plan takes it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from kvpolicy.plan import Plan
from kvpolicy.runtime.cache import PolicyCache
from kvpolicy.runtime.stepping import Stepper


@dataclass(eq=False)
class Loan:
    """What a cache that came by way of a shelf carries: whose it is, what it was made with, and its stepper if it has
    one. A copy of the cache is nobody's."""

    shelf: Shelf
    settings: dict[str, Any]
    stepper: Stepper | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Loan, (Shelf(), self.settings)

    def take_stepper(self, model: Any, cache: PolicyCache) -> Stepper:
        """The stepper that came with the cache, once; a new one where none did."""
        stepper, self.stepper = self.stepper, None
        return stepper or Stepper(model, cache)

    def give_back(self, stepper: Stepper) -> None:
        """The loop is done and nobody else has the cache."""
        self.shelf.put(stepper, self)


class Shelf:
    """Where a decode loop puts the cache that `generate` made for it, once nobody else can have it.

    At most one lies here, so that a call of another shape never needs more memory than without a shelf. Copies and
    pickles start empty: nothing on it belongs to them.
    """

    def __init__(self) -> None:
        self._kept: tuple[Stepper, Loan] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Shelf, ()

    def __len__(self) -> int:
        return int(self._kept is not None)

    def put(self, stepper: Stepper, loan: Loan) -> None:
        """Keep a stepper and its cache, in place of what was kept."""
        with self._lock:
            before, self._kept = self._kept, (stepper, loan)
        if before is not None:
            before[0].close()

    def lend(self, model: Any, plan: Plan, settings: dict[str, Any]) -> PolicyCache:
        """`PolicyCache(plan, **settings)`: the kept one, empty again, if it is that and knows this model; else a new
        one, once the kept one is dropped. Nobody gets a cache that another still has."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None:
            stepper, loan = kept
            cache = stepper.cache
            if cache.plan == plan and loan.settings == settings and stepper.fits(model):
                cache.reset()
                loan.stepper = stepper
                return cache
            stepper.close()
            del kept, stepper, loan, cache  # its memory is free before the new one is made
        cache = PolicyCache(plan, **settings)
        cache.loan = Loan(self, settings)
        return cache

    def clear(self) -> None:
        """Free what is kept."""
        with self._lock:
            before, self._kept = self._kept, None
        if before is not None:
            before[0].close()
