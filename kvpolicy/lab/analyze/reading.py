"""A live model reads texts, a piece at a time, and its attention is sorted as it goes by. No map is ever whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvpolicy.errors import ModelError, UsageError
from kvpolicy.lab.analyze.classes import Sorted, sort
from kvpolicy.lab.analyze.rules import Rules
from kvpolicy.lab.analyze.stream import Stream, rows_of
from kvpolicy.lab.recording import Teller, decoder_config, layers_of
from kvpolicy.lab.running import Request, encode, sampling
from kvpolicy.lab.watching import StopWhen, Write
from kvpolicy.patching import listening

PIECE = 256
"""Tokens that the model reads at once."""

Tell = Callable[[int, int], None]
"""(tokens read, of how many)."""


@dataclass(frozen=True)
class Passage:
    """A text in token ids [1, N]: its first ``prompt`` tokens, then what was written to them."""

    name: str
    ids: Tensor
    prompt: int

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])


def passage(tokenizer: Any, name: str, request: Request, written: str = "", most: int | None = None) -> Passage:
    """A prompt, through the chat template where the model has one, and what was written to it.

    Args:
        most: tokens after which the text is cut.

    Raises:
        UsageError: see ``encode``.
    """
    ids = encode(tokenizer, request)
    prompt = ids.shape[1]
    if written:
        ids = torch.cat([ids, tokenizer(written, return_tensors="pt", add_special_tokens=False).input_ids.long()], 1)
    ids = ids[:, :most]
    return Passage(name, ids, min(prompt, int(ids.shape[1])))


@torch.no_grad()
def written(
    model: Any,
    tokenizer: Any,
    name: str,
    request: Request,
    *,
    write: Write = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> Passage:
    """A prompt, and what the model writes to it with its full cache.

    Raises:
        UsageError, ModelError: it cannot be written.
    """
    ids = encode(tokenizer, request).to(model.device)
    prompt = int(ids.shape[1])
    check_length(model, prompt + request.max_new_tokens)
    torch.manual_seed(request.seed)
    if request.max_new_tokens:
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=DynamicCache(config=decoder_config(model)),
            max_new_tokens=request.max_new_tokens,
            streamer=Teller(tokenizer, write, prompt + request.max_new_tokens),
            stopping_criteria=[StopWhen(stop)],
            **sampling(request, tokenizer),
        )
    return Passage(name, ids.cpu(), prompt)


def check_length(model: Any, tokens: int) -> None:
    """Raise ModelError where the model knows fewer positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ModelError(
            f"this model knows {limit} positions, and this text has {tokens}; shorten it, as with --max-tokens {limit}"
        )


@torch.no_grad()
def read(
    model: Any, text: Passage, rules: Rules, layers: Sequence[int] = (), tell: Tell = lambda done, tokens: None
) -> dict[int, Sorted]:
    """By layer, the classes of the tokens of a text. The model is as before afterwards.

    Memory holds the model's full cache, ``BLOCK_BYTES`` of attention, and about 40 bytes for each token of each head.

    Args:
        layers: numbers of the layers that are listened to; all that a policy may govern unless given.

    Raises:
        UsageError: the text is too short for these rules, or the model carries a policy.
        ModelError: the text is too long for the model, or its attention is no plain softmax, or there is no such layer.
    """
    layers = layers_of(model, layers)
    check_length(model, text.length)
    if text.length < rules.shortest:
        raise UsageError(
            f"{text.name} has {text.length} tokens, and with a window of {rules.local} and silences of {rules.silence} "
            f"no token of fewer than {rules.shortest} can be judged; take a longer text, or a smaller --window and "
            "--silence"
        )
    streams: dict[int, Stream] = {}

    def hear(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        stream = streams.setdefault(layer, Stream(query.shape[1], rules))
        for rows in rows_of(query[0], key[0], scaling):
            stream.see(rows)

    ids, cache = text.ids.to(model.device), DynamicCache(config=decoder_config(model))
    with listening(model, layers, hear, whole=True):
        for begin in range(0, text.length, PIECE):
            piece = ids[:, begin : begin + PIECE]
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tell(begin + piece.shape[1], text.length)
    return {layer: sort(stream.notes(), rules) for layer, stream in streams.items()}
