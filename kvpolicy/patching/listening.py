"""Listen to the attention of a model: what each layer's attention is given, after rotation, in every pass.

The model computes what it always computes. An attention function registered with transformers hands on the new queries,
keys and values and then calls the one before it; hooks tell it for which layers. All of it is undone at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from kvpolicy.architecture import architecture_of
from kvpolicy.errors import ModelError, UsageError
from kvpolicy.patching.attention import PREFIX, fallback, register
from kvpolicy.patching.changes import Journal
from kvpolicy.patching.checks import decoder_layers, decoder_of

HEARD = "heard|"
"""What the names of our attention functions begin with."""

Hear = Callable[[int, Tensor, Tensor, Tensor, float], None]
"""(layer, queries [B, Q, N, D], keys [B, K, N, D], values [B, K, N, D] of the N new tokens, scaling). Who asks for
whole keys and values gets those of all tokens so far."""


@contextmanager
def listening(model: Any, layers: Sequence[int], hear: Hear, *, whole: bool = False) -> Iterator[None]:
    """Inside, ``hear`` is told of every pass of these decoder layers, in the order in which they run.

    Args:
        whole: tell keys and values of all tokens that the layer's cache holds, not of the new ones alone.

    Raises:
        UsageError: the model carries a policy.
        ModelError: its architecture is not supported, or has no such layer.
    """
    architecture = architecture_of(model.config.model_type)
    stack, decoder = decoder_layers(model, architecture), decoder_of(model, architecture)
    previous = decoder.config._attn_implementation or "eager"
    if previous.startswith((PREFIX, HEARD)):
        raise UsageError("only a model without a policy can be listened to; call kvpolicy.remove(model) first")
    missing = [layer for layer in layers if not 0 <= layer < len(stack)]
    if missing:
        raise ModelError(f"this model has the decoder layers 0..{len(stack) - 1}, not {missing[0]}")
    name = register(previous, HEARD, partial(attend, previous))
    journal = Journal()
    try:
        journal.attend_by(model, decoder, name)
        for layer in layers:
            journal.before(stack[layer], Ear(layer, hear, whole))
        yield
    finally:
        journal.undo()


@dataclass(frozen=True)
class Ear:
    """Tells a decoder layer's attention, through the keywords that are passed on to it, whom to tell."""

    layer: int
    hear: Hear
    whole: bool = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "kv_ear": self}


def attend(
    previous: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    kv_ear: Ear | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as before; where somebody listens, tell first. Of keys and values [B, K, T, D] the newest are the new."""
    if kv_ear is not None:
        begin = 0 if kv_ear.whole else key.shape[2] - query.shape[2]
        kv_ear.hear(kv_ear.layer, query, key[:, :, begin:], value[:, :, begin:], kwargs["scaling"])
    output: tuple[Tensor, Tensor | None] = fallback(previous, module)(
        module, query, key, value, attention_mask, *args, **kwargs
    )
    return output
