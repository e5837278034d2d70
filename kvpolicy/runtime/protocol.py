"""What transformers asks of a layer of a cache, answered for layers whose slots never grow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpolicy.attention import Formula
from kvpolicy.errors import CacheError
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.moment import GIVEN, PROMPT, Moment, opened


class FixedLayer(CacheLayerMixin):
    """A layer that the plan knew every size of; the attention function hands it keys and values, and not ``update``."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    window: int | None = None  # what the model calls its sliding window; None where the whole text is in sight
    clocks: Clocks
    heads: int
    """KV heads that it caches."""
    dtype: torch.dtype
    """Of the numbers it attends with: the plan's, whatever its pools are stored in."""
    moment: Moment
    steps: Any = None
    """In the midst of a pass of many tokens that is compiled: what takes each of them (`compiling.TokenSteps`)."""
    ahead: Any = None
    """In the midst of a pass of many tokens: what is known of the next ones (`ahead.Ahead`)."""

    def look_ahead(self, query: Tensor, key: Tensor, formula: Formula) -> Any:
        """What is known beforehand of the next tokens [B, Q or K, n, D]; None where each looks by itself."""
        return None

    @property
    def query_position(self) -> Tensor:
        """Where the queries of the pass that is open stand in their rows' text [B, N], -1 for padding."""
        kind = opened(self.moment)
        position = self.moment.position if kind == PROMPT else self.clocks.position[:, None]
        if kind == GIVEN:  # the clocks stand at the last of them
            assert position is not None
            return position + torch.arange(1 - len(self.moment.steps), 1, device=position.device)
        assert position is not None
        return position

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is lazy: the plan knew every size."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise CacheError("this cache belongs to a model with a policy applied; kvpolicy.apply(model, policy) first")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return self.clocks.columns

    def get_max_length(self) -> int:
        return -1
