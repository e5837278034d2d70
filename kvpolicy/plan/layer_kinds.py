"""Which decoder layers a policy governs: those that attend to the whole text. What the others do, read off a config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvpolicy.errors import ModelError

FULL = "full_attention"
SLIDING = "sliding_attention"
CHUNKED = "chunked_attention"
STATES = ("linear_attention", "conv")
"""Kinds of layers that keep a state of fixed size in place of tokens: no policy touches them; they take no slots."""

OLDER = {"mamba": "linear_attention", "attention": FULL}
"""What older configs call a kind of layer."""

SPANS = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}
"""Kinds of layers that look back over so many tokens, and what a config calls that number."""


@dataclass(frozen=True)
class LocalLayer:
    """A decoder layer that attends to the text nearby, and that no policy touches.

    ``index`` is its number in the model. A query at position p sees the positions after p - ``span`` (sliding), or
    those of its own chunk of ``span`` tokens (chunked), up to p.
    """

    index: int
    kind: str
    span: int


def local_layers(read: Callable[[str], Any], count: int, model_type: str) -> tuple[LocalLayer, ...]:
    """Those of ``count`` decoder layers that are local, in order; ``read`` gives a config's value by name, or None.

    `layer_types` names each layer's kind where a config has it; without it, a `sliding_window` holds for every layer,
    unless `use_sliding_window` is off.

    Raises:
        ModelError: a kind of layer that has no place here, or none that attends to the whole text.
    """
    kinds = _kinds(read, count)
    found = []
    for index, kind in enumerate(kinds):
        if kind == FULL or kind in STATES:
            continue
        if kind not in SPANS:
            raise ModelError(
                f"layer {index} of this {model_type} model is of kind {kind}, which kvpolicy does not know; it knows "
                f"{', '.join((FULL, *SPANS, *STATES))}"
            )
        span = read(SPANS[kind])
        if not span or int(span) < 1:
            raise ModelError(f"this {model_type} model has {kind} layers, and its config gives no {SPANS[kind]}")
        found.append(LocalLayer(index, kind, int(span)))
    if len(found) == count:
        spans = sorted({layer.span for layer in found})
        raise ModelError(
            f"all {count} layers of this {model_type} model attend to the last {spans[0]} tokens only, so no layer is "
            "left for a policy; to govern them all, load the model with sliding_window=None and, where its config has "
            "layer_types, layer_types=['full_attention'] * config.num_hidden_layers (the same model up to that length)"
        )
    return tuple(found)


def state_layers(read: Callable[[str], Any], count: int, model_type: str) -> tuple[int, ...]:
    """Those of ``count`` decoder layers that keep a state in place of tokens, by their number in the model.

    Raises:
        ModelError: all of them do.
    """
    found = tuple(index for index, kind in enumerate(_kinds(read, count)) if kind in STATES)
    if len(found) == count:
        raise ModelError(f"no layer of this {model_type} model keeps tokens, so there is nothing to govern")
    return found


def _kinds(read: Callable[[str], Any], count: int) -> Sequence[str]:
    named = read("layer_types")
    if named:
        return [OLDER.get(str(kind), str(kind)) for kind in named]
    slides = read("sliding_window") is not None and read("use_sliding_window") is not False
    return [SLIDING if slides else FULL] * count
