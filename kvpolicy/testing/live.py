"""Compare a live model's cache with the oracle: what its attention really saw, layer by layer and pass by pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpolicy.attention import Formula, Rotation, turn
from kvpolicy.patching import cache_for
from kvpolicy.runtime import PolicyCache
from kvpolicy.testing.agreement import Agreement
from kvpolicy.testing.beside import Heard, check_pass, rotate_of


class Witness:
    """Stands before a cache layer's ``forward`` and keeps the pass's queries, keys, values and output."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.seen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.formula = Formula(0.0)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
        output = type(self.layer).forward(self.layer, query, key, value, formula)
        self.seen, self.formula = (query, key, value, output), formula
        return output


class LiveAgreement:
    """A patched model that runs beside the oracle, in eager mode.

    Args:
        model: a model with a policy applied (not compiled).
        cache: its cache; by default one for the given lengths.
    """

    def __init__(self, model: Any, cache: PolicyCache | None = None, **lengths: Any) -> None:
        self.model = model
        self.cache = cache or cache_for(model, **lengths)
        plan, self.rotation = self.cache.plan, self.cache.rotation or Rotation.none()
        self.agreement = Agreement(plan, rows=plan.batch, rotate=rotate_of(plan, self.rotation))
        self.witnesses = [Witness(layer) for layer in self.cache.governed]
        for witness in self.witnesses:
            witness.layer.forward = witness
        for part in self.cache.parts():
            part.shows_reading = True

    @torch.no_grad()
    def feed(self, ids: Tensor, mask: Tensor | None = None, layers: list[int] | None = None, **inputs: Any) -> Tensor:
        """One pass of the model over ``ids`` [B, N], compared in ``layers`` (all by default); returns the logits.

        Args:
            mask: [B, columns seen + N], 0 for padding, as the model takes it.
            inputs: further inputs of the model.

        Raises:
            Disagreement: the first layer, row and head where the runtime kept otherwise.
        """
        columns, first = ids.shape[1], self.cache.get_seq_length() == 0
        if mask is not None:
            inputs.setdefault("position_ids", (mask.cumsum(1) - 1).clamp(min=0)[:, -columns:])
        places = self.cache.coming(columns, None if mask is None else mask[:, -columns:])
        logits = self.model(ids, attention_mask=mask, past_key_values=self.cache, logits_to_keep=1, **inputs).logits
        valid = None if mask is None or columns == 1 else mask[:, -columns:].bool()
        traits = self.cache.moment.traits if columns > 1 or first else {}
        for number in range(len(self.witnesses)) if layers is None else layers:
            seen = self.witnesses[number].seen
            assert seen is not None
            query, key, value, output = (tensor.float() for tensor in seen)
            query, key = self._unrotated(query, places), self._unrotated(key, places)
            heard = Heard(query, key, value, output, valid, traits.get("special"), traits.get("image"))
            opened = "generated" if columns == 1 and not first else "prompt"
            check_pass(self.agreement, self.cache, number, heard, opened, formula=self.witnesses[number].formula)
        return logits

    def _unrotated(self, vectors: Tensor, places: Tensor) -> Tensor:
        """What the oracle of compact positions is given: vectors [B, heads, N, D] without rotation, in float64."""
        frequencies = torch.tensor(self.rotation.frequencies, device=vectors.device)
        at = places[:, None]
        return turn(vectors.double(), at, torch.zeros_like(at), frequencies) if self.rotation.frequencies else vectors
