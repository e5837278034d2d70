"""Choose the next token of every row from its logits, without a look at the text: what can be part of a recorded step.

`generate` hands a loop logits processors and stopping criteria. Those that read the text, keep something between two
tokens, are not transformers' own, or ask the device a question must run after the step; then all of them do.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EosTokenCriteria, GenerationConfig
from transformers.generation.stopping_criteria import MaxLengthCriteria

from kvpolicy.runtime.waiting import HostWaited, no_waiting

OWN = "transformers.generation.logits_process"


def sample(scores: Tensor) -> Tensor:
    """One draw per row [B] from scores [B, V]: the numbers of `torch.multinomial`, without its look at the device.

    multinomial divides by exponential noise and takes the largest; it also asks the host whether the weights are sane.
    """
    weights = nn.functional.softmax(scores, dim=-1)
    return (weights / torch.empty_like(weights).exponential_(1)).argmax(-1)


@dataclass(frozen=True, eq=False)
class Choice:
    """How tokens are chosen from logits alone; `key` is equal for two choices that would record the same work.

    processors: transformers' own, each called with no text. ends: the ids [E] after which a row is fed `pad` [], or
    None where no row ends before the others.
    """

    processors: tuple[Any, ...]
    do_sample: bool
    ends: Tensor | None
    pad: Tensor | None
    key: Hashable

    @classmethod
    def of(cls, processors: Any, criteria: Any, config: GenerationConfig, logits: Tensor) -> Choice | None:
        """What `generate` asks for, tried on the logits [B, V] of a prompt; None where a step alone cannot do it."""
        if any(type(each) not in (MaxLengthCriteria, EosTokenCriteria) for each in criteria):
            return None
        eos = [each.eos_token_id.to(logits.device).flatten() for each in criteria if isinstance(each, EosTokenCriteria)]
        ends = torch.cat(eos) if eos else None
        pad = config._pad_token_tensor if eos else None
        choice = cls(tuple(processors), bool(config.do_sample), ends, pad, None)
        key = choice._key()
        if key is None or not choice._works_without_text(logits) or choice._key() != key:
            return None
        return cls(choice.processors, choice.do_sample, ends, pad, key)

    def next(self, logits: Tensor, unfinished: Tensor) -> Tensor:
        """Tokens [B] after logits [B, V]; `unfinished` [B] int64 loses, in place, the rows that end here."""
        scores = self._process(logits.to(copy=True, dtype=torch.float32))
        tokens = sample(scores) if self.do_sample else scores.argmax(-1)
        if self.ends is not None:
            if self.pad is not None:
                tokens = tokens * unfinished + self.pad * (1 - unfinished)
            unfinished.mul_((tokens[:, None] != self.ends).all(-1))
        return tokens

    def _process(self, scores: Tensor) -> Tensor:
        for each in self.processors:
            scores = each(_NO_TEXT, scores)
        return scores

    def _works_without_text(self, logits: Tensor) -> bool:
        if any(type(each).__module__ != OWN for each in self.processors):
            return False
        try:
            with no_waiting():
                self._process(logits.to(copy=True, dtype=torch.float32))
        except (_Read, HostWaited, TypeError):  # torch's own functions refuse what is no tensor with a TypeError
            return False
        return True

    def _key(self) -> Hashable:
        try:
            parts = [(type(each), _frozen(vars(each))) for each in self.processors]
            return (self.do_sample, tuple(parts), _frozen(self.ends), _frozen(self.pad))
        except _Opaque:
            return None


class _Read(Exception):
    """A processor asked for the text."""


class _NoText:
    """Given to processors in place of the text: whoever looks at it says so."""

    def __getattr__(self, name: str) -> Any:
        raise _Read(name)

    def __getitem__(self, index: Any) -> Any:
        raise _Read("[...]")

    def __iter__(self) -> Any:
        raise _Read("iteration")

    def __len__(self) -> int:
        raise _Read("len")


_NO_TEXT = _NoText()


class _Opaque(Exception):
    """A setting that cannot be compared with another."""


def _frozen(value: Any) -> Hashable:
    """A setting as something to compare: numbers, words, tensors, and collections of them."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype), tuple(value.flatten().tolist()))
    if isinstance(value, dict):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device | torch.dtype):
        return str(value)
    raise _Opaque
