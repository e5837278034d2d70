"""The five steps of one layer: admit, (read), attend, observe, update. Once for a prompt pass, once for a token."""

from __future__ import annotations

from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.runtime.chunks import attend_in_chunks
from kvpolicy.runtime.moment import PROMPT
from kvpolicy.runtime.prompt_pass import PromptPass
from kvpolicy.runtime.token_pass import TokenPass


class PolicyLayer(TokenPass, PromptPass):
    """One layer's slots under a policy.

    ``forward`` replaces attention over a growing cache. Shapes: query [B, Q, N, D]; key, value [B, K, N, D].
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention output [B, N, Q, D] of a pass that ``PolicyCache.begin`` opened."""
        kind = self.moment.kind
        if kind is None:
            raise CacheError(
                "this pass was not opened: the model was called in a way that skips kvpolicy's hooks (a model compiled "
                "as a whole, or a decoder layer called by hand); call cache.begin(columns) before each pass, or let "
                "kvpolicy compile it: kvpolicy.apply(model, policy, compile=True)"
            )
        if kind == PROMPT and self.moment.chunks:
            return attend_in_chunks(self, query, key, value, self._prompt, scaling)
        if kind == PROMPT:
            return self._prompt(query, key, value, scaling)
        return self._token(query, key, value, scaling, kind)
