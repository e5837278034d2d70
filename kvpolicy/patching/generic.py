"""Families that nobody has stated: found by the structure of a model, and tried on a few tokens before they are used.

What is found is held against the model itself. First it runs alone, and every decoder layer must call its attention
once, through transformers' attention interface, with queries, keys and values of the shapes that the config says. Then
it runs under the policy that keeps everything, and must give the logits it gave alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvpolicy.architecture import Architecture, families, refuse
from kvpolicy.errors import ModelError
from kvpolicy.patching.attention import fallback, register
from kvpolicy.patching.changes import Journal
from kvpolicy.patching.checks import decoder_layers, decoder_of
from kvpolicy.plan import ModelGeometry

TRIED = "tried|"
"""What the name of our attention function begins with while a model is tried."""

PROMPT, STEPS = 12, 4
"""Tokens that a model is tried on."""

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""How far logits may be off, as a share of the largest; in shorter types a tenth: what is wrong is off by all of it."""

USUAL = frozenset({"hidden_states", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position"})
"""What a decoder layer is called with that a compiled step does without, beside `position_embeddings`."""


def find_architecture(model: Any) -> Architecture:
    """What a file in `patches/` would state of this model, by its structure.

    Raises:
        ModelError: it is not built as transformers' decoders are, and where it differs.
    """
    refuse(model.config.model_type)
    base = model.base_model
    if getattr(model.config.get_text_config(), "kv_lora_rank", None):
        _refuse(model, families()["latent"].refused)
    if getattr(model.config, "is_encoder_decoder", False):
        _refuse(model, "it has an encoder, and its decoder attends to that too")
    names = {module: name for name, module in base.named_modules()}
    told = model.get_decoder()  # of Llama 4 with its tower, a language model with a head
    said: tuple[Any, ...] = (told, getattr(told, "model", None), base, getattr(base, "model", None))
    decoder: Any = next((each for each in said if each in names and _lists(each)), base)
    config = getattr(decoder, "config", None)
    if not isinstance(config, PreTrainedConfig):
        _refuse(model, f"{type(decoder).__name__} was found for its text decoder, and it has no config")
    lists, count = _lists(decoder), getattr(config, "num_hidden_layers", None)
    if len(lists) != 1:
        _refuse(model, f"{len(lists) or 'no'} lists of {count} decoder layers were found in {type(decoder).__name__}")
    states = ModelGeometry.from_config(config).states
    layers = [layer for index, layer in enumerate(getattr(decoder, lists[0])) if index not in states]
    attention = {name for layer in layers for name in _attentions(layer)}
    if len(attention) != 1 or not all(len(_attentions(layer)) == 1 for layer in layers):
        found = f"found: {', '.join(sorted(attention))}" if attention else "none was found"
        _refuse(model, f"not every decoder layer has one attention module, under one name ({found})")
    rotary = [name for name, part in decoder.named_children() if isinstance(getattr(part, "inv_freq", None), Tensor)]
    return Architecture(
        model_types=(model.config.model_type,),
        covers="found by its structure, untested",
        decoder=names[decoder],
        layers=lists[0],
        attention=attention.pop(),
        **({"rotary": rotary[0]} if rotary else {}),
    )


def _lists(decoder: nn.Module) -> list[str]:
    """The names of its lists of as many modules as its config says it has layers."""
    count = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    return [name for name, part in decoder.named_children() if isinstance(part, nn.ModuleList) and len(part) == count]


def _attentions(layer: nn.Module) -> list[str]:
    return [name for name, part in layer.named_children() if "Attention" in type(part).__name__]


def _refuse(model: Any, reason: str) -> NoReturn:
    raise ModelError(
        f"{type(model).__name__} ({model.config.model_type}) cannot be patched without knowing it: {reason}"
    )


@dataclass
class Trial:
    """What was seen of a model that ran alone."""

    ids: Tensor
    logits: Tensor
    plain_layers: bool
    """Whether its decoder layers are called with what a compiled step gives them, and no more."""

    def hold(self, model: Any, cache: Any) -> None:
        """Compare with the logits of the same tokens under a policy that keeps everything, over its cache.

        Raises:
            ModelError: they are others, or there are none.
        """
        parts = self.ids.split([PROMPT, *[1] * STEPS], dim=1)
        try:
            with resting(model):
                logits = torch.cat([model(part, past_key_values=cache).logits.float() for part in parts], 1)
        except Exception as error:
            _refuse(model, f"it did not run over a policy's cache: {type(error).__name__}: {error}")
        off = float((logits - self.logits).abs().max() / self.logits.abs().max())
        if not off <= CLOSE.get(model.dtype, 0.1):
            _refuse(
                model,
                f"with all tokens kept, its logits are off by {off:.2g} of the largest, so its attention does "
                "something that the attention interface does not show",
            )


def try_alone(model: Any, architecture: Architecture, geometry: ModelGeometry) -> Trial:
    """Run a model as it is over a few tokens, and look at every call of its attention.

    Raises:
        ModelError: it does not call its attention as transformers' decoders do, and how.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(decoder_of(model, architecture).config.vocab_size)
    ids = torch.randint(vocabulary, (1, PROMPT + STEPS), generator=generator).to(model.device)
    layers = [
        (index, layer)
        for index, layer in enumerate(decoder_layers(model, architecture))
        if index not in geometry.states
    ]
    with _watched(model, architecture, layers) as seen, resting(model):
        try:
            logits = model(ids, use_cache=False).logits
        except Exception as error:
            _refuse(model, f"it did not run over {ids.shape[1]} tokens: {type(error).__name__}: {error}")
    for (index, _), note in zip(layers, seen, strict=True):
        reason = note.wrong(geometry, ids.shape[1])
        if reason:
            _refuse(model, f"in layer {index}, {reason}")
    return Trial(ids, logits.float(), all(note.plain for note in seen))


@contextmanager
def resting(model: Any) -> Iterator[None]:
    """The model in eval mode, without gradients."""
    awake = [module for module in model.modules() if module.training]
    for module in awake:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in awake:
            module.training = True


@dataclass
class Note:
    """What a decoder layer was called with, and what it called the attention interface with."""

    attention: nn.Module
    plain: bool = False
    cached: bool = False
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def wrong(self, geometry: ModelGeometry, tokens: int) -> str:
        """Why this is no attention that a policy can stand under; "" where it is."""
        if not self.cached:
            return "no cache is handed to it as past_key_values"
        if len(self.calls) != 1:
            times = "does not reach" if not self.calls else f"reaches {len(self.calls)} times"
            return f"what the layer is given {times} the attention interface"
        module, query, key, value, scaling = self.calls[0]
        q, k, v = ((geometry.query_heads, tokens), *[(geometry.kv_heads, tokens)] * 2)
        if module is not self.attention:
            return f"{type(module).__name__} attends, and not {type(self.attention).__name__}"
        if key[-1] != value[-1]:
            return f"keys have {key[-1]} numbers a head and values {value[-1]}, where a cache's have as many"
        for name, shape, (heads, length) in (("queries", query, q), ("keys", key, k), ("values", value, v)):
            if tuple(shape[1:]) != (heads, length, geometry.head_dim):
                wanted = f"{heads} heads of {geometry.head_dim} numbers"
                return f"{name} of the shape {tuple(shape)} were given, and the config says {wanted}"
        return "" if isinstance(scaling, float) else "attention was called without its scaling"

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Stands before the decoder layer."""
        others = {name for name, value in kwargs.items() if value is not None} - USUAL
        self.cached = "past_key_values" in kwargs
        self.plain = len(args) <= 1 and others == {"position_embeddings"}
        return args, {**kwargs, "kv_note": self}


@contextmanager
def _watched(model: Any, architecture: Architecture, layers: list[tuple[int, nn.Module]]) -> Iterator[list[Note]]:
    decoder, journal = decoder_of(model, architecture), Journal()
    previous = decoder.config._attn_implementation or "eager"
    name = register(previous, TRIED, partial(_attend, previous))
    notes = [Note(getattr(layer, architecture.attention)) for _, layer in layers]
    try:
        journal.attend_by(model, decoder, name)
        for (_, layer), note in zip(layers, notes, strict=True):
            journal.before(layer, note)
        yield notes
    finally:
        journal.undo()


def _attend(
    previous: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    kv_note: Note | None = None,
    **kwargs: Any,
) -> Any:
    """Attend as before; note the call."""
    if kv_note is not None:
        kv_note.calls.append((module, query.shape, key.shape, value.shape, kwargs.get("scaling")))
    return fallback(previous, module)(module, query, key, value, attention_mask, *args, **kwargs)
