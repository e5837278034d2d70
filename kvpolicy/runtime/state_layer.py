"""A layer that keeps a state of fixed size in place of tokens (linear attention, a convolution): transformers' own.

No policy touches it, and it takes no slots: the model reads and writes its state in the policy's cache as in any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import cache_utils

from kvpolicy.errors import ModelError

# Its name since transformers 5.4; where it is missing, models with such layers had caches of their own.
_Layer: Any = getattr(cache_utils, "LinearAttentionLayer", object)

STATES = ("conv_states", "recurrent_states")


class StateLayer(_Layer):  # type: ignore[misc]
    """The state of one layer, made when the model first writes it.

    Raises:
        ModelError: this version of transformers keeps such states elsewhere.
    """

    def __init__(self) -> None:
        if _Layer is object:
            raise ModelError(
                "this version of transformers keeps the state of linear layers outside of its cache layers, where a "
                "policy's cache cannot hold it; install a newer one"
            )
        super().__init__()

    def take(self, other: StateLayer, repeats: int) -> None:
        """Become a copy of another, each row so many times in a row."""
        vars(self).update(copy.deepcopy(vars(other)))
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

    def _held(self) -> Iterator[tuple[Any, Any, Tensor]]:
        for name in STATES:
            states: Any = getattr(self, name)
            for key, tensor in list(states.items() if isinstance(states, dict) else enumerate(states)):
                if tensor is not None:
                    yield states, key, tensor
