"""One generated step of a model over a policy's cache, again and again: the innermost part of every decode loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvpolicy.runtime.cache import PolicyCache


class Stepper:
    """Runs generated steps of one model over one cache."""

    def __init__(self, model: Any, cache: PolicyCache) -> None:
        self.model, self.cache = model, cache

    def step(self, tokens: Tensor) -> Tensor:
        """One generated pass: tokens int64 [B, 1] -> logits [B, V]. The result is overwritten by the next step."""
        logits: Tensor = self.model(input_ids=tokens, past_key_values=self.cache, return_dict=True).logits[:, -1]
        return logits
