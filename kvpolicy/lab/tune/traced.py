"""What recorded attention tells of a policy, and how it is recorded: the first and cheap stage of a search.

A text is read once with the full cache, and a few layers are recorded. The oracle then plays it through each candidate:
no model runs. What it would have answered is held against what the full cache answered to the same queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import DynamicCache

from kvpolicy.lab.analyze.reading import PIECE
from kvpolicy.lab.fidelity.full_cache import Forced
from kvpolicy.lab.recording import Tape, decoder_config, describe, digest_of, kind_of
from kvpolicy.lab.tune.sizing import Lengths
from kvpolicy.language import Policy
from kvpolicy.patching import listening
from kvpolicy.plan import make_plan
from kvpolicy.testing.attention import Attention
from kvpolicy.testing.feeding import OracleAlone, passes
from kvpolicy.testing.full_cache import FullCache
from kvpolicy.testing.trace_file import TraceWriter
from kvpolicy.testing.traces import Trace

Array = np.ndarray


@dataclass(frozen=True)
class Kept:
    """What a policy keeps of the attention of recorded texts, over layers, KV heads and generated tokens.

    error: of attention's output, the squared distance from the full cache's over the square of that. mass: the share of
    the full cache's attention that goes to what is attended to. tokens: generated ones that were played.
    """

    error: float
    mass: float
    tokens: int


class Placed:
    """[L, heads, T, D] of all layers of a model, in place of an array, of which only some were recorded."""

    def __init__(self, layers: int, places: Sequence[int], recorded: Any) -> None:
        self.recorded, self.places = recorded, {place: index for index, place in enumerate(places)}
        self.shape = (layers, *recorded.shape[1:])

    def __getitem__(self, layer: int) -> Array:
        numbers: Array = self.recorded[self.places[layer]]
        return numbers


@dataclass(frozen=True)
class Traced:
    """A recorded text: ``said`` as the policy numbers its layers, of which ``layers`` were recorded, and what the full
    cache answered [steps, Q, D], by layer."""

    said: Attention
    layers: tuple[int, ...]
    answers: dict[int, Array]
    full: FullCache

    @classmethod
    def of(cls, path: Path, governed: Sequence[int], steps: int, special: Sequence[int] = ()) -> Traced:
        """From a trace of the model's layers; at most ``steps`` of its generated tokens.

        Args:
            governed: the model's numbers of all layers that a policy governs.
            special: positions of the prompt's special tokens.
        """
        trace = Trace(path)
        read = trace.text(steps=min(steps, trace.about.steps))
        recorded = tuple(governed.index(layer) for layer in trace.about.layers)
        queries, keys, values = (
            tuple(cast(Array, Placed(len(governed), recorded, row)) for row in rows)
            for rows in (read.queries, read.keys, read.values)
        )
        said = Attention(read.prompts, read.steps, queries, keys, values, scaling=read.scaling, special=tuple(special))
        return cls(said, recorded, {layer: _answers(said, layer) for layer in recorded}, FullCache(said))


def _answers(said: Attention, layer: int) -> Array:
    """What attention over the whole text gives for the generated tokens [steps, Q, D] float64."""
    queries, keys, values = (np.asarray(rows[0][layer], dtype=float) for rows in (said.queries, said.keys, said.values))
    first, group = said.prompts[0], len(queries) // len(keys)
    found = np.empty((said.steps, len(queries), queries.shape[-1]))
    for head in range(len(queries)):
        logits = queries[head, first:] @ keys[head // group].T * said.scale
        logits[np.arange(logits.shape[1]) > first + np.arange(said.steps)[:, None]] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        found[:, head] = weights / weights.sum(-1, keepdims=True) @ values[head // group]
    return found


def kept(policy: Policy, texts: Sequence[Traced], lengths: Lengths) -> Kept:
    """Play recorded texts through a policy.

    Args:
        lengths: those that the policy is planned for, as on the model itself.

    Raises:
        UsageError, PolicyError: there is no plan.
    """
    wrong = whole = mass = 0.0
    tokens = count = 0
    for text in texts:
        said = text.said
        plan = make_plan(policy, said.geometry, prompt=lengths.prompt, max_new_tokens=lengths.new_tokens)
        feed = OracleAlone(plan, text.layers)
        for place, now in enumerate(_generated(passes(said, plan.prompt_chunk), feed, said)):
            for step in feed.feed(said, now):
                assert step.output is not None
                answer = text.answers[step.layer][place]
                wrong += float(((step.output[0] - answer) ** 2).sum())
                whole += float((answer**2).sum())
                for head, pools in enumerate(step.heads):
                    paid = text.full.probabilities(step.layer, 0, head, step.prompt_len + step.t - 1)
                    read = np.fromiter((at for pool in pools.values() for at in pool.read), dtype=int)
                    mass += float(paid[read].sum())
                    count += 1
        tokens += said.steps
    return Kept(wrong / whole if whole else 0.0, mass / count if count else 1.0, tokens)


def _generated(all_passes: Iterator[Any], feed: OracleAlone, said: Attention) -> Iterator[Any]:
    """The passes of generated tokens; those of the prompt are fed on the way."""
    for now in all_passes:
        if now.kind == "generated":
            yield now
        else:
            feed.feed(said, now)


@torch.no_grad()
def record_text(model: Any, tokenizer: Any, name: str, text: Forced, path: Path, layers: Sequence[int]) -> None:
    """Read a text with the full cache and write what these layers attend with to a trace. The model is as before
    afterwards.

    Raises:
        ModelError: the model's layers scale differently, or one cannot be listened to.
        OSError: the file cannot be written.
    """
    ids, cache = text.ids[None].to(model.device), DynamicCache(config=decoder_config(model))
    with TraceWriter(path, kind_of(model)) as writer:
        tape = Tape(writer, layers)
        with listening(model, layers, tape.hear):
            for begin in range(0, ids.shape[1], PIECE):
                model(ids[:, begin : begin + PIECE], past_key_values=cache, use_cache=True, logits_to_keep=1)
        about = describe(model, tokenizer, name, tape, len(text.prompt), text.ids.tolist(), digest_of(model.config))
        writer.finish(about)


def spread(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """So many of them, evenly apart, neither the first nor the last where that can be."""
    count = min(count, len(layers))
    return tuple(layers[int((place + 0.5) * len(layers) / count)] for place in range(count))
