"""Record what the attention of a model gets while it writes with its full cache: queries, keys and values, layer by
layer, straight to disk. ``kvpolicy trace`` prints what this returns; ``kvpolicy.testing.traces`` replays it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, TextStreamer

from kvpolicy.architecture import architecture_of
from kvpolicy.errors import ModelError, UsageError
from kvpolicy.lab.running import Request, encode, sampling
from kvpolicy.lab.watching import StopWhen, Write
from kvpolicy.patching import listening
from kvpolicy.patching.checks import decoder_of
from kvpolicy.plan import ModelGeometry
from kvpolicy.testing.trace_file import STORED, WHAT, About, TraceWriter

Stored = dict[str, torch.dtype]
DTYPES: Stored = {name: getattr(torch, name) for name in STORED}


@dataclass(frozen=True)
class Recorded:
    """What one recording gave; ``ended`` is "text", "length" or "interrupted"."""

    path: str
    bytes: int
    model: str
    layers: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    max_new_tokens: int
    text: str
    ended: str
    scaling: float
    dtype: str
    device: str
    seed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Tape:
    """Takes down what it hears of one row; ``columns`` counts the tokens of each layer."""

    def __init__(self, writer: TraceWriter, layers: Sequence[int]) -> None:
        self.writer = writer
        self.columns = dict.fromkeys(layers, 0)
        self.scalings: set[float] = set()

    def hear(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """One pass of one layer [1, heads, N, D] each."""
        for what, given in zip(WHAT, (query, key, value), strict=True):
            self.writer.append(0, layer, what, stored(given[0].transpose(0, 1), self.writer.dtype))
        self.columns[layer] += query.shape[2]
        self.scalings.add(float(scaling))

    @property
    def scaling(self) -> float:
        if len(self.scalings) != 1:
            raise ModelError(f"layers of this model scale differently ({sorted(self.scalings)}); record one at a time")
        return min(self.scalings)


class Teller(TextStreamer):
    """Hands the text on piece by piece, and keeps the ids; tokens after the first ``most`` are not for the reader."""

    def __init__(self, tokenizer: Any, write: Write, most: int) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.most = write, most
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt's ids, then with each new token."""
        self.ids += value.flatten().tolist()
        if len(self.ids) <= self.most:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def decoder_config(model: Any) -> Any:
    """The config of the text decoder, which gives its shape."""
    return decoder_of(model, architecture_of(model.config.model_type)).config


def layers_of(model: Any, asked: Sequence[int]) -> tuple[int, ...]:
    """The layers to listen to: those asked for, or all that a policy may govern.

    Raises:
        ModelError: the model has no such layer, or one that attends to less than the whole text.
    """
    architecture, shape = architecture_of(model.config.model_type), ModelGeometry.from_config(model.base_model.config)
    if shape.softcap is not None or architecture.sinks or architecture.temperature is not None:
        raise ModelError(
            "only queries and keys are listened to, and attention is computed from them by softmax alone; a model "
            f"of type {shape.model_type} caps its logits, has attention sinks or tempers its queries, and has another"
        )
    known = shape.governed
    for layer in asked:
        if layer not in known:
            why = "attends to the text nearby only" if 0 <= layer < shape.depth else "is not there"
            last = shape.depth - 1
            raise ModelError(f"layer {layer} {why}; this model's layers are 0..{last}, give others with --layers")
    return tuple(asked) or tuple(known)


def expected_bytes(model: Any, layers: Sequence[int], tokens: int) -> int:
    """How large the file of a text of so many tokens will be, but for its header."""
    shape = ModelGeometry.from_config(model.base_model.config)
    each = np.dtype(STORED[kind_of(model)][1]).itemsize
    return len(layers) * tokens * (shape.query_heads + 2 * shape.kv_heads) * shape.head_dim * each


def record(
    model: Any,
    tokenizer: Any,
    name: str,
    request: Request,
    path: Path,
    layers: Sequence[int] = (),
    *,
    write: Write = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> Recorded:
    """Let a model write with its full cache, and record it. The model is as before afterwards.

    Memory holds one pass of one layer beside the model and its cache. Of the text, every token that was attended to is
    recorded: the prompt and the ``max_new_tokens`` generated ones, fewer where the text ends or ``stop`` says so.

    Raises:
        UsageError, ModelError: it cannot be done, or the file cannot be written; nothing is left behind.
    """
    layers = layers_of(model, layers)
    ids = encode(tokenizer, request).to(model.device)
    length, limit = ids.shape[1], getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length + request.max_new_tokens > limit:
        most = f"a prompt of {length} tokens with {request.max_new_tokens} new ones needs more; shorten one of them"
        raise ModelError(f"this model knows {limit} positions, and {most}")
    options = sampling(request, tokenizer)
    torch.manual_seed(request.seed)
    told = Teller(tokenizer, write, length + request.max_new_tokens)
    digest, begun = digest_of(model.config), time.perf_counter()
    try:
        with TraceWriter(path, kind_of(model)) as writer:
            tape = Tape(writer, layers)
            with listening(model, layers, tape.hear), torch.no_grad():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=DynamicCache(config=decoder_config(model)),
                    max_new_tokens=request.max_new_tokens + 1,  # the last one is chosen, but not attended to
                    streamer=told,
                    stopping_criteria=[StopWhen(stop)],
                    **options,
                )
            about = describe(model, tokenizer, name, tape, length, told.ids, digest)
            size = writer.finish(about)
    except OSError as error:
        raise UsageError(f"cannot write the trace to {path}: {error.strerror or error}") from None
    ended = "length" if about.steps == request.max_new_tokens else "interrupted" if stop() else "text"
    return Recorded(
        path=str(path),
        bytes=size,
        model=name,
        layers=layers,
        prompt_tokens=length,
        new_tokens=about.steps,
        max_new_tokens=request.max_new_tokens,
        text=tokenizer.decode(about.token_ids[0][length:], skip_special_tokens=True),
        ended=ended,
        scaling=about.scaling,
        dtype=about.dtype,
        device=str(model.device),
        seed=request.seed,
        seconds=time.perf_counter() - begun,
    )


def describe(model: Any, tokenizer: Any, name: str, tape: Tape, prompt: int, ids: Sequence[int], digest: str) -> About:
    """What was recorded."""
    shape = ModelGeometry.from_config(model.base_model.config)
    (length,) = set(tape.columns.values())
    heard = tuple(ids[:length])
    return About(
        model=name,
        model_type=model.config.model_type,
        model_layers=shape.layers,
        layers=tuple(tape.columns),
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        scaling=tape.scaling,
        dtype=tape.writer.dtype,
        prompts=(prompt,),
        steps=length - prompt,
        revision=getattr(model.config, "_commit_hash", None) or "",
        digest=digest,
        token_ids=(heard,),
        tokens=(tuple(tokenizer.decode([token]) for token in heard),),
    )


def kind_of(model: Any) -> str:
    """The type that is recorded: the model's own, or float32 where a file has none like it."""
    name = str(model.dtype).removeprefix("torch.")
    return name if name in STORED else "float32"


def stored(tensor: Tensor, dtype: str) -> np.ndarray:
    """A tensor as a trace stores it: bfloat16 as its bit patterns."""
    there = tensor.to(DTYPES[dtype]).contiguous().cpu()
    return (there.view(torch.int16) if dtype == "bfloat16" else there).numpy().view(STORED[dtype][1])


def digest_of(config: Any) -> str:
    """Of a model's config, whichever version of transformers wrote it."""
    fields = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:12]
