"""The five steps of one layer: admit, (read), attend, observe, update. Once for a prompt pass, once for a token."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kvpolicy.attention import Formula
from kvpolicy.runtime.chunks import attend_in_chunks
from kvpolicy.runtime.given import attend_one_by_one
from kvpolicy.runtime.moment import GIVEN, PROMPT, opened
from kvpolicy.runtime.prompt_pass import PromptPass
from kvpolicy.runtime.token_pass import TokenPass


class PolicyLayer(TokenPass, PromptPass):
    """One layer's slots under a policy.

    ``forward`` replaces attention over a growing cache. Shapes: query [B, Q, N, D]; key, value [B, K, N, D].
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
        """Attention output [B, N, Q, D] of a pass that ``PolicyCache.begin`` opened."""
        kind = opened(self.moment)
        if kind == PROMPT and self.moment.chunks:
            return attend_in_chunks(self, query, key, value, self._prompt, formula)
        if kind == PROMPT:
            return self._prompt(query, key, value, formula)
        if kind == GIVEN:
            return attend_one_by_one(self, query, key, value, formula)
        take = self.take if self.steps is None or self.shows_reading else partial(self.steps, self)
        return take(query, key, value, formula, kind)
