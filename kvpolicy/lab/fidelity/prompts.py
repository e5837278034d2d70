"""Prompts that are read once for all policies: in front of a prompt the full cache and every policy see the same.

A policy drops after the prompt's last token, or between its chunks. Where there are no chunks, all arms have the same
queries, keys and values in every layer, and the same to say at the end. So the first arm's are kept, and a later arm's
layers are only shown them: no weights are read, attention is left out where nobody scores by it, and what the prompt's
queries paid to each token is summed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kvpolicy.attention import Formula
from kvpolicy.lab.compare.running import padded
from kvpolicy.lab.fidelity.full_cache import Forced
from kvpolicy.patching.checks import decoder_layers
from kvpolicy.patching.patch import patch_of
from kvpolicy.runtime import PolicyCache

MOST_BYTES = 4 * 2**30
"""Of queries, keys and values that are kept, in all layers; prompts for which it would be more are read by each arm."""

Given = tuple[Tensor, Tensor, Tensor, Formula]
"""What a layer was given: query [B, Q, N, D], key and value [B, K, N, D]."""


class Reading:
    """The prompts of some texts, read by the first arm that comes, and shown to the others.

    ``said``: what the body says after each prompt [B, 1, D], None while nobody has read them.
    """

    def __init__(self, model: Any, texts: Sequence[Forced]) -> None:
        self.model, self.texts = model, list(texts)
        self.said: Tensor | None = None
        self._given: list[Given] = []
        self._found: list[dict[Hashable, Tensor]] = []  # by layer, what some policy made of them and others make, too

    def take(self, body: Any, cache: PolicyCache) -> Tensor:
        """Bring the prompts into an empty cache of a patched model; what is said after each [B, 1, D]."""
        if cache.plan.prompt_chunk is not None or cache.states:
            return read(body, cache, self.texts)
        layers = decoder_layers(self.model, patch_of(self.model).architecture)
        if self.said is None:
            with _replaced(cache.layers, [self._keeping(layer) for layer in cache.layers]):
                said = read(body, cache, self.texts)
            if self._given:
                self.said = said.clone()
            return said
        with _replaced(layers, list(map(_Shown, self._given, self._found))):
            read(body, cache, self.texts)
        return self.said

    def _keeping(self, layer: Any) -> Callable[..., Tensor]:
        """Stands in for a cache layer's ``forward``, and keeps what it is given."""
        forward = layer.forward

        def keep(query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
            if len(self._given) or self._fits(query, key, value):
                self._given.append((query, key, value, formula))
                self._found.append({})
            said: Tensor = forward(query, key, value, formula)
            return said

        return keep

    def _fits(self, *first: Tensor) -> bool:
        """Whether there is room for all layers, by the first one's."""
        return (
            sum(tensor.nbytes for tensor in first) * self.model.config.get_text_config().num_hidden_layers <= MOST_BYTES
        )


class _Shown:
    """Stands in for a decoder layer's ``forward``: its cache layer is shown what it was given once."""

    def __init__(self, given: Given, found: dict[Hashable, Tensor]) -> None:
        self.given, self.found = given, found

    def __call__(self, hidden_states: Tensor, *args: Any, kv_layer: Any, **kwargs: Any) -> Tensor:
        kv_layer.moment.shown = self.found
        try:
            kv_layer.forward(*self.given)
        finally:
            kv_layer.moment.shown = None
        return hidden_states


@contextmanager
def _replaced(objects: Sequence[Any], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """``forward`` of each is another for the length of a ``with`` block."""
    before = [vars(each).get("forward") for each in objects]
    for each, forward in zip(objects, forwards, strict=True):
        each.forward = forward
    try:
        yield
    finally:
        for each, forward in zip(objects, before, strict=True):
            del each.forward
            if forward is not None:
                each.forward = forward


def read(body: Any, cache: PolicyCache, texts: Sequence[Forced]) -> Tensor:
    """All prompts in one pass, padded on the left; what is said after each [B, 1, D]."""
    ids, mask = padded([text.prompt for text in texts], 0)
    cache.expect_prompt(ids.shape[1])
    said: Tensor = body(
        input_ids=ids.to(cache.device),
        attention_mask=mask.to(cache.device),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(cache.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return said[:, -1:]
