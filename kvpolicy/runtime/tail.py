"""Batches padded on the right: what the padding behind a row's last token gives out.

Whoever chooses the next token by the last column of a prompt, as ``generate`` does, would choose it by a column of
padding there, and no policy can say what that attends to. So those columns repeat the row's last token, and the next
token is what the row alone would have got.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def newest_token(valid: Tensor) -> Tensor:
    """By column the last one up to it that holds a token [B, N], -1 where none does; ``valid`` [B, N] says which do."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    return torch.where(valid, columns, -1).cummax(1).values


class Tail:
    """The output of each row's last token, over the passes of one prompt turn."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """No pass is open, and none of the turn is behind."""
        self._index: Tensor | None = None
        self._carried: Tensor | None = None  # [B, 1, H], where more of the turn is to come
        self._more = False

    def open(self, valid: Tensor | None, more: bool) -> None:
        """A prompt pass begins, whose tokens are ``valid`` [B, N] (None: all), maybe with more of its turn to come."""
        self._more, self._index = more, None
        if valid is not None and not bool(valid[:, -1].all()):
            self._index = newest_token(valid)

    def close(self, output: Any) -> Any:
        """The decoder's output, a tuple or a ModelOutput, as it should be; None where it may stay."""
        index, self._index = self._index, None
        hidden: Tensor = output[0]
        if index is not None:
            before = hidden[:, :1] if self._carried is None else self._carried
            index = (index + 1)[..., None].to(hidden.device).expand_as(hidden)
            hidden = torch.cat([before.to(hidden), hidden], 1).gather(1, index)
        self._carried = hidden[:, -1:].clone() if self._more else None
        self._more = False
        if index is None:
            return None
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output
