"""Feeds a text to the oracle, or to the runtime with the oracle beside it, pass by pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvpolicy.language import Policy
from kvpolicy.oracle import Oracle, Step
from kvpolicy.plan import Plan, make_plan
from kvpolicy.testing.attention import Attention
from kvpolicy.testing.full_cache import FullCache
from kvpolicy.testing.seen import Seen


@dataclass(frozen=True)
class Pass:
    """Which positions each row brings to a pass; ``more`` of the prompt is to come."""

    kind: str
    rows: tuple[slice, ...]
    more: bool = False


class Feed(Protocol):
    """Something that a text can be fed to."""

    plan: Plan

    @property
    def near_ties(self) -> int:
        """Choices so far that float32 cannot tell from the oracle's."""
        ...

    def feed(self, said: Attention, now: Pass) -> list[Step]:
        """Every row of every layer after a pass."""
        ...


def plan_for(policy: Policy, said: Attention) -> Plan:
    """The plan of a policy for exactly this text; raises as ``make_plan`` does."""
    prompts, turns = (min(said.prompts), max(said.prompt_totals)), 1 + len(said.turns)
    return make_plan(policy, said.geometry, batch=said.rows, prompt=prompts, max_new_tokens=said.steps, turns=turns)


def watch(feed: Feed, said: Attention) -> Iterator[Seen]:
    """Every layer, row and KV head after every pass."""
    full = FullCache(said)
    for now in passes(said, feed.plan.prompt_chunk):
        for step in feed.feed(said, now):
            yield from (Seen(feed.plan, step, head, full) for head in range(len(step.heads)))


def passes(said: Attention, chunk: int | None) -> Iterator[Pass]:
    """The prompt, and then one token a row at a time, up to the next turn's prompt.

    The prompt comes in chunks of so many tokens of each row; with None as the text has it, in chunks of so many columns
    of a left-padded batch.
    """
    said_so_far = [0] * said.rows
    pauses = [*(turn.after for turn in said.turns), said.steps - sum(turn.after for turn in said.turns)]
    for prompts, steps in zip([said.prompts, *(turn.rows(said.rows) for turn in said.turns)], pauses, strict=True):
        longest = max(prompts)
        stride = chunk or said.chunk or max(1, longest)
        for start in range(0, longest, stride):
            stop = min(start + stride, longest)
            ahead = [0 if chunk else longest - prompt for prompt in prompts]  # columns of padding
            cuts = [[min(max(0, at - by), of) for at in (start, stop)] for by, of in zip(ahead, prompts, strict=True)]
            rows = (slice(at + a, at + b) for at, (a, b) in zip(said_so_far, cuts, strict=True))
            yield Pass("prompt", tuple(rows), more=stop < longest)
        said_so_far = [at + prompt for at, prompt in zip(said_so_far, prompts, strict=True)]
        for step in range(steps):
            yield Pass("generated", tuple(slice(at + step, at + step + 1) for at in said_so_far))
        said_so_far = [at + steps for at in said_so_far]


def said_of(said: Attention, now: Pass, kind: str) -> list[np.ndarray]:
    """By row: which tokens of a pass are of a kind [N] bool."""
    return [row[kind][span] for row, span in zip(said.kinds, now.rows, strict=True)]


class OracleAlone:
    """The oracle; where positions are compact it leaves keys as they are, for synthetic ones carry no rotation.

    ``layers`` are those that are fed; all of them unless given.
    """

    near_ties = 0

    def __init__(self, plan: Plan, layers: Sequence[int] | None = None) -> None:
        self.plan = plan
        self.layers = range(plan.geometry.layers) if layers is None else layers
        rotate = (lambda vectors, positions: vectors) if plan.policy.positions == "compact" else None
        self.oracle = Oracle(plan, rows=plan.batch, rotate=rotate)

    def feed(self, said: Attention, now: Pass) -> list[Step]:
        special = [row.tolist() for row in said_of(said, now, "special")]
        modality = [["image" if here else None for here in row] for row in said_of(said, now, "image")]
        steps = []
        for layer in self.layers:
            given = (
                [row[layer][:, span] for row, span in zip(rows, now.rows, strict=True)]
                for rows in (said.queries, said.keys, said.values)
            )
            steps += self.oracle.step(
                layer,
                *given,
                kind=now.kind,
                more=now.more,
                special=special,
                modality=modality,
                scaling=said.scaling,
            )
        return steps


class RuntimeBeside:
    """The runtime, compared with the oracle after every pass; ``compiled`` are its generated ones. Imports torch.

    ``frequencies``: where positions are compact, keys carry a rotation of these in the runtime; by default none.
    """

    def __init__(self, plan: Plan, *, compiled: bool = False, frequencies: tuple[float, ...] = ()) -> None:
        from kvpolicy.attention import Rotation
        from kvpolicy.testing.beside import Beside, Run, run_layer

        generated: Run = run_layer
        if compiled:
            from kvpolicy.testing.compiled import CompiledRun

            generated = CompiledRun()
        self.plan = plan
        self.beside = Beside(plan, generated=generated, rotation=Rotation(frequencies))

    @property
    def near_ties(self) -> int:
        return len(self.beside.agreement.near_ties)

    def feed(self, said: Attention, now: Pass) -> list[Step]:
        import torch

        lengths = [span.stop - span.start for span in now.rows]
        columns = max(lengths)

        def padded(rows: tuple[np.ndarray, ...], layer: int) -> torch.Tensor:
            """[B, heads, columns, D], rows at the right."""
            parts = [row[layer][:, span] for row, span in zip(rows, now.rows, strict=True)]
            return torch.from_numpy(np.stack([np.pad(p, ((0, 0), (columns - p.shape[1], 0), (0, 0))) for p in parts]))

        def flagged(kind: str) -> torch.Tensor:
            """[B, columns] bool."""
            flags = [np.pad(row, (columns - len(row), 0)) for row in said_of(said, now, kind)]
            return torch.from_numpy(np.stack(flags))

        flags = {"special": flagged("special"), "modality": flagged("image")} if said.special or said.images else {}
        valid = torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]
        layers = [
            (padded(said.queries, layer), padded(said.keys, layer), padded(said.values, layer))
            for layer in range(said.geometry.layers)
        ]
        return self.beside.feed(layers, valid, kind=now.kind, more=now.more, scaling=said.scaling, **flags)
