"""A layer that keeps a state of fixed size in place of tokens (linear attention, a convolution): transformers' own.

No policy touches it, and it takes no slots: the model reads and writes its state in the policy's cache as in any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

STATES = ("conv_states", "recurrent_states")


class StateLayer(LinearAttentionLayer):
    """The state of one layer, made when the model first writes it."""

    def take(self, other: StateLayer, repeats: int) -> None:
        """Become a copy of another, each row so many times in a row."""
        self.__dict__.update(copy.deepcopy(other.__dict__))
        for states, key, tensor in self._held():
            states[key] = tensor.repeat_interleave(repeats, 0)

    def select(self, rows: Tensor) -> None:
        """Rows in a new order, in place."""
        for _, _, tensor in self._held():
            tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))

    @property
    def written(self) -> bool:
        """Whether it holds anything yet."""
        return any(True for _ in self._held())

    def _held(self) -> Iterator[tuple[dict[int, Tensor | None], int, Tensor]]:
        for name in STATES:
            states: dict[int, Tensor | None] = getattr(self, name)
            for key, tensor in list(states.items()):
                if tensor is not None:
                    yield states, key, tensor
