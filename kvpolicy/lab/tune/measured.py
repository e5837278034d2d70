"""What the model itself says under a policy, led through the same texts as its full cache: the second stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.lab.fidelity.forcing import BLOCK, Forcing, force
from kvpolicy.lab.fidelity.full_cache import Forced, full_states
from kvpolicy.lab.fidelity.summary import Blocks, Estimate, estimate
from kvpolicy.language import Policy


@dataclass(frozen=True)
class Measured:
    """A policy on the model.

    agreement: the share of places at which it puts the full cache's first choice first. kl: KL(full cache || policy) in
    nats. bytes: of one row's cache. evicted: tokens, over all texts, layers and KV heads. blocks: of places, which an
    interval is drawn from.
    """

    agreement: Estimate
    kl: Estimate
    bytes: int
    evicted: int
    places: int
    blocks: int


@dataclass
class Bench:
    """A model and the texts that it is led through; what its full cache says of them is asked once."""

    model: Any
    tokenizer: Any
    texts: Sequence[Forced]
    batch: int = 8
    generic: bool = False
    _full: list[Tensor] = field(default_factory=list)

    @property
    def forcing(self) -> Forcing:
        return Forcing.of(self.texts, batch=self.batch, generic=self.generic)

    def measure(
        self, policy: Policy, tell: Callable[[int, float], None] = lambda tokens, seconds: None
    ) -> Measured | str:
        """Lead the texts through a policy; the reason where it cannot run on them.

        Raises:
            ModelError: no policy can run on this model.
        """
        if not self._full:
            self._full = [full_states(self.model, text) for text in self.texts]
        try:
            found = force(self.model, self.tokenizer, policy, self.texts, self._full, self.forcing, tell=tell)
        except (UsageError, PolicyError) as refusal:
            return str(refusal).splitlines()[0]
        blocks = Blocks.of([each.count for each in found], [each.sums for each in found], BLOCK)
        return Measured(
            agreement=estimate(blocks, "top1"),
            kl=estimate(blocks, "kl"),
            bytes=max(each.bytes for each in found),
            evicted=sum(each.evicted for each in found),
            places=int(blocks.count.sum()),
            blocks=int((blocks.count > 0).sum()),
        )
