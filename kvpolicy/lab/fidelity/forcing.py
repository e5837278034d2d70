"""Texts through a policy's cache under teacher forcing, held against the full cache at every place of the output.

The prompt goes through prompt passes and the output through generated steps one by one, as if the model had written it:
a policy decides at every step. Texts run as rows of one batch: rows share the price of a step, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvpolicy.lab.fidelity.full_cache import Body, Forced, Head
from kvpolicy.lab.fidelity.mass import EVERY, Mass
from kvpolicy.lab.fidelity.prompts import Reading, read
from kvpolicy.lab.watching import kept_by_row
from kvpolicy.language import Policy
from kvpolicy.patching import applied, cache_for
from kvpolicy.plan import ModelGeometry
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.moment import GIVEN
from kvpolicy.runtime.stepping import Stepper

BLOCK = 64
"""Places of the output that are compared at once, and of which one number of each measure is kept."""

MEASURES = ("kl", "top1", "nll", "full_nll")

MASS = "mass"
"""Measured at some places alone (``mass.py``), which are counted apart."""


@dataclass
class Series:
    """What came of one text, by blocks of ``BLOCK`` places of its output, the last of which may be shorter.

    count: places of each block. sums: of each measure over a block: ``kl``, KL(full cache || policy) in nats; ``top1``,
    whether both put the same token first; ``nll`` and ``full_nll``, the negative log likelihood of the text's token
    under the policy and under the full cache, in nats.
    mass, mass_count: by block, the sum of the attention mass kept over the places where it was measured, and how many
    these are. evicted: over all layers and KV heads. resident: the most of any of them at the end. bytes: this row's of
    the cache.
    """

    number: int
    count: list[int] = field(default_factory=list)
    sums: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    mass: list[float] = field(default_factory=list)
    mass_count: list[int] = field(default_factory=list)
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

    def add_mass(self, by_place: Mapping[int, float]) -> None:
        """The mass kept by place of the output; those behind the text's end are another's."""
        self.mass, self.mass_count = [0.0] * len(self.count), [0] * len(self.count)
        for place, mass in by_place.items():
            if place < self.places:
                self.mass[place // BLOCK] += mass
                self.mass_count[place // BLOCK] += 1


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
    batch is planned for these, so that what a policy makes of them is the same in all. batch: texts at once. by_layer:
    which of two ways through the model they take, None: the faster (``takes_layers``). mass_every: of so many places,
    at one the attention mass kept is measured, 0: nowhere; nor where steps of the whole model are compiled."""

    prompt: tuple[int, int]
    new_tokens: int
    batch: int = 8
    compile: bool | str = False
    generic: bool = False
    by_layer: bool | None = None
    mass_every: int = EVERY

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
    reading: Reading | None = None,
    tell: Callable[[int, float], None] = lambda tokens, seconds: None,
) -> list[Series]:
    """Run texts under a policy whose params are bound. The model is as before afterwards.

    Args:
        full: of each text, what ``full_states`` gave.
        reading: of these texts, where they go as one batch; by default every batch reads its own prompts.
        tell: after every block, tokens of all outputs so far, and seconds.

    Raises:
        UsageError, ModelError, PolicyError: the policy cannot run on this model, or on these lengths.
    """
    head, done, began = Head(model), 0, time.perf_counter()
    geometry = ModelGeometry.from_config(model.config)
    by_layer = takes_layers(model.device, geometry) if how.by_layer is None else how.by_layer
    every = how.mass_every if by_layer or not how.compile else 0

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
            full_here = full[start : start + how.batch]
            found += _Batch(model, cache, rows, full_here, head, step, by_layer, every, reading).run()
    return found


def takes_layers(device: torch.device, geometry: ModelGeometry) -> bool:
    """Whether texts go through a model layer by layer (`Lead`), or token by token through all of it.

    The first is the faster on a CPU, where the price of a step is weights to read. A GPU replays recorded steps. A
    layer with a state in place of tokens takes its tokens singly.
    """
    return device.type == "cpu" and not geometry.states


class Lead:
    """Leads texts through an empty cache, as its rows; a row that has ended is fed on.

    body: a patched model, which says logits, or its ``Body``, which says hidden states. reading: where the prompts of
    these texts are kept for other policies; it is a body's.

    The tokens of the output are all known. So the model takes a stretch of them in one call, and each layer goes
    through them by itself, one by one, as generated steps (runtime/given.py); or, with ``by_layer`` False, the model is
    called for each. What is kept after each token is the same.
    """

    def __init__(
        self,
        body: Any,
        cache: PolicyCache,
        texts: Sequence[Forced],
        *,
        by_layer: bool,
        reading: Reading | None = None,
    ) -> None:
        self.body, self.cache, self.texts, self.by_layer, self.reading = body, cache, texts, by_layer, reading
        self.longest, device = max(len(text.output) for text in texts), cache.device
        self.tokens = torch.zeros(len(texts), self.longest, dtype=torch.int64, device=device)
        for row, text in enumerate(texts):
            self.tokens[row, : len(text.output)] = text.output
        self.lengths = torch.tensor([[len(text.prompt)] for text in texts], device=device)

    def run(self, stretch: int = BLOCK) -> Iterator[tuple[int, Tensor]]:
        """A place of the outputs, and what the body says before this and the next ones [B, n, D], of which some may be
        overwritten later. After each the cache stands where it does when the last of these places is asked about.

        Args:
            stretch: places at once, at the most; one also ends where a row does.
        """
        if self.reading is None:
            yield 0, read(self.body, self.cache, self.texts)
        else:
            yield 0, self.reading.take(self.body, self.cache)
        if self.by_layer:
            yield from self._by_layer(stretch)
        else:
            yield from self._by_step()

    def _by_layer(self, stretch: int) -> Iterator[tuple[int, Tensor]]:
        ends = {len(text.output) - 1 for text in self.texts} | set(range(stretch - 1, self.longest - 1, stretch))
        for start, stop in pairwise(sorted({0} | ends)):
            self.cache.begin(stop - start, kind=GIVEN)
            self.cache.opened_ahead = True
            said = self.body(
                input_ids=self.tokens[:, start:stop],
                position_ids=self.lengths + torch.arange(start, stop, device=self.lengths.device),
                past_key_values=self.cache,
                use_cache=True,
            )
            yield start + 1, said.logits

    def _by_step(self) -> Iterator[tuple[int, Tensor]]:
        stepper = Stepper(self.body, self.cache)
        try:
            stepper.start(self.tokens[:, :1], self.lengths)
            for place in range(self.longest - 1):
                yield place + 1, stepper.step(self.tokens[:, place : place + 1])[:, None]
        finally:
            stepper.close()


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
        by_layer: bool,
        mass_every: int,
        reading: Reading | None,
    ) -> None:
        self.lead = Lead(Body(model), cache, texts, by_layer=by_layer, reading=reading)
        self.cache, self.texts, self.full, self.mass_every = cache, texts, full, mass_every
        self.head, self.tell, self.device = head, tell, model.device
        self.series = [Series(text.number, bytes=cache.bytes // len(texts)) for text in texts]
        self.longest = self.lead.longest

    def run(self) -> list[Series]:
        if not self.mass_every:
            self._run()
            return self.series
        with Mass(self.cache, self.mass_every) as mass:
            self._run()
        for row, series in enumerate(self.series):
            series.add_mass({place: float(by_row[row]) for place, by_row in mass.by_place.items()})
        return self.series

    def _run(self) -> None:
        block: Tensor | None = None
        for start, states in self.lead.run(BLOCK):
            stop = start + states.shape[1]
            block = states.new_empty(len(states), BLOCK, states.shape[2]) if block is None else block
            block[:, start % BLOCK : (stop - 1) % BLOCK + 1] = states
            if stop % BLOCK == 0 or stop == self.longest:
                self._compare(block, (stop - 1) // BLOCK * BLOCK, stop)
            self._count([row for row, text in enumerate(self.texts) if len(text.output) == stop])

    def _compare(self, block: Tensor, start: int, stop: int) -> None:
        """Hold the places [start, stop) of every row that reaches so far against the full cache."""
        here = 0
        for row, text in enumerate(self.texts):
            stop_here = min(stop, len(text.output))
            if stop_here <= start:
                continue
            places = slice(start, stop_here)
            told = block[row, : stop_here - start]
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
