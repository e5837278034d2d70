"""Texts through a policy's cache under teacher forcing, held against the full cache at every place of the output.

The prompt goes through prompt passes and the output through generated steps one by one, as if the model had written it:
a policy decides at every step. Texts run as rows of one batch: what a step costs is mostly reading weights, and rows
share that; they share nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpolicy.lab.compare.running import padded
from kvpolicy.lab.fidelity.full_cache import Body, Forced, Head
from kvpolicy.lab.watching import kept_by_row
from kvpolicy.language import Policy
from kvpolicy.patching import applied, cache_for
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.stepping import Stepper

BLOCK = 64
"""Places of the output that are compared at once, and of which one number of each measure is kept."""

MEASURES = ("kl", "top1", "nll", "full_nll")


@dataclass
class Series:
    """What came of one text, by blocks of ``BLOCK`` places of its output, the last of which may be shorter.

    count: places of each block. sums: of each measure over a block: ``kl``, KL(full cache || policy) in nats; ``top1``,
    whether both put the same token first; ``nll`` and ``full_nll``, the negative log likelihood of the text's token
    under the policy and under the full cache, in nats.
    evicted: over all layers and KV heads. resident: the most of any of them at the end. bytes: this row's of the cache.
    """

    number: int
    count: list[int] = field(default_factory=list)
    sums: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    evicted: int = 0
    resident: int = 0
    bytes: int = 0

    @property
    def places(self) -> int:
        return sum(self.count)

    def mean(self, measure: str) -> float:
        """Over all places."""
        return sum(self.sums[measure]) / self.places

    def add(self, compared: dict[str, Tensor]) -> None:
        """A block: by measure, a number for each place [n]."""
        self.count.append(len(compared["kl"]))
        for name, values in compared.items():
            self.sums[name].append(float(values.double().sum()))


def compare(head: Head, full: Tensor, policy: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """By measure, a number for each place [n], from hidden states [n, D] and the text's tokens [n]."""
    expected, found = head(full).log_softmax(-1), head(policy).log_softmax(-1)
    return {
        "kl": (expected.exp() * (expected - found)).sum(-1).clamp(min=0),
        "top1": (expected.argmax(-1) == found.argmax(-1)).float(),
        "nll": -found.gather(-1, tokens[:, None])[:, 0],
        "full_nll": -expected.gather(-1, tokens[:, None])[:, 0],
    }


@dataclass(frozen=True)
class Forcing:
    """How texts are run. prompt: the (fewest, most) tokens of any prompt, new_tokens the most of any output: every
    batch is planned for these, so that what a policy makes of them is the same in all. batch: texts at once."""

    prompt: tuple[int, int]
    new_tokens: int
    batch: int = 8
    compile: bool | str = False
    generic: bool = False

    @classmethod
    def of(cls, texts: Sequence[Forced], **more: Any) -> Forcing:
        """For these texts."""
        prompts = [len(text.prompt) for text in texts]
        return cls((min(prompts), max(prompts)), max(len(text.output) for text in texts), **more)


@torch.no_grad()
def force(
    model: Any,
    tokenizer: Any,
    policy: Policy,
    texts: Sequence[Forced],
    full: Sequence[Tensor],
    how: Forcing,
    *,
    tell: Callable[[int, float], None] = lambda tokens, seconds: None,
) -> list[Series]:
    """Run texts under a policy whose params are bound. The model is as before afterwards.

    Args:
        full: of each text, what ``full_states`` gave.
        tell: after every block, tokens of all outputs so far, and seconds.

    Raises:
        UsageError, ModelError, PolicyError: the policy cannot run on this model, or on these lengths.
    """
    head, done, began = Head(model), 0, time.perf_counter()

    def step(tokens: int) -> None:
        nonlocal done
        done += tokens
        tell(done, time.perf_counter() - began)

    found: list[Series] = []
    with applied(model, policy, compile=how.compile, special_tokens=tokenizer, generic=how.generic):
        cache: PolicyCache | None = None
        for start in range(0, len(texts), how.batch):
            rows = texts[start : start + how.batch]
            if cache is None or cache.plan.batch != len(rows):
                cache = cache_for(model, prompt=how.prompt, max_new_tokens=how.new_tokens, batch=len(rows))
            cache.reset()
            found += _Batch(model, cache, rows, full[start : start + how.batch], head, step).run()
    return found


def lead(body: Any, cache: PolicyCache, texts: Sequence[Forced]) -> Iterator[Tensor]:
    """Lead texts through an empty cache, as its rows: before each place of the longest output, what ``body`` says of it
    in every row [B, D] (overwritten by the next). A row that has ended is fed on.

    body: a patched model, which says logits, or its ``Body``, which says hidden states.
    """
    device, longest = cache.device, max(len(text.output) for text in texts)
    tokens = torch.zeros(len(texts), longest, dtype=torch.int64, device=device)
    for row, text in enumerate(texts):
        tokens[row, : len(text.output)] = text.output
    yield _prompts(body, cache, texts)
    lengths = torch.tensor([[len(text.prompt)] for text in texts], device=device)
    stepper = Stepper(body, cache)
    try:
        stepper.start(tokens[:, :1], lengths)
        for place in range(longest - 1):
            yield stepper.step(tokens[:, place : place + 1])
    finally:
        stepper.close()


def _prompts(body: Any, cache: PolicyCache, texts: Sequence[Forced]) -> Tensor:
    """All prompts in one pass, padded on the left; what is said after each [B, D]."""
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
    return said[:, -1]


class _Batch:
    """Some texts as rows of one cache; a row that has ended is fed on, and counted no more."""

    def __init__(
        self,
        model: Any,
        cache: PolicyCache,
        texts: Sequence[Forced],
        full: Sequence[Tensor],
        head: Head,
        tell: Callable[[int], None],
    ) -> None:
        self.body, self.cache, self.texts, self.full = Body(model), cache, texts, full
        self.head, self.tell, self.device = head, tell, model.device
        self.series = [Series(text.number, bytes=cache.bytes // len(texts)) for text in texts]
        self.longest = max(len(text.output) for text in texts)

    def run(self) -> list[Series]:
        block: Tensor | None = None
        for place, states in enumerate(lead(self.body, self.cache, self.texts)):
            block = states.new_empty(BLOCK, *states.shape) if block is None else block
            block[place % BLOCK] = states
            if (place + 1) % BLOCK == 0 or place + 1 == self.longest:
                self._compare(block, place - place % BLOCK, place + 1)
            self._count([row for row, text in enumerate(self.texts) if len(text.output) == place + 1])
        return self.series

    def _compare(self, block: Tensor, start: int, stop: int) -> None:
        """Hold the places [start, stop) of every row that reaches so far against the full cache."""
        here = 0
        for row, text in enumerate(self.texts):
            stop_here = min(stop, len(text.output))
            if stop_here <= start:
                continue
            places = slice(start, stop_here)
            told = block[: stop_here - start, row]
            compared = compare(
                self.head, self.full[row][places].to(self.device), told, text.output[places].to(self.device)
            )
            self.series[row].add(compared)
            here += stop_here - start
        self.tell(here)

    def _count(self, rows: list[int]) -> None:
        """What has been kept of rows that end here."""
        if rows:
            evicted, most = kept_by_row(self.cache)
            for row in rows:
                self.series[row].evicted, self.series[row].resident = evicted[row], most[row]
