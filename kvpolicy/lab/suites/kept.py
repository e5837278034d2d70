"""Where kept tokens stand, step by step: one text of the full cache's, led through every policy's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.lab.bench.tables import Table
from kvpolicy.lab.compare.arms import Arm, bound
from kvpolicy.lab.compare.running import Run
from kvpolicy.lab.fidelity.full_cache import Forced
from kvpolicy.lab.grid import edges, sampled
from kvpolicy.lab.suites.base import Experiment, Found, Heat, Lab, Rows, Tell, append_row, read_rows
from kvpolicy.lab.suites.claims import Finding, Word
from kvpolicy.patching import applied, cache_for
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.stepping import Stepper

MOMENTS, CELLS = 64, 64
"""Moments and stretches of the text that are kept of a course."""


@dataclass(frozen=True)
class Kept(Experiment):
    """Positions of what is held, over all layers and KV heads.

    unified: series that let the prompt compete with what is generated, of which is said that the prompt loses.
    """

    name: str
    title: str
    paper: str
    arms: Callable[[Lab], Sequence[Arm]]
    unified: tuple[str, ...] = ()
    same: str | None = None

    def measure(self, lab: Lab, path: Path, known: Sequence[Path], tell: Tell) -> list[str]:
        done = {(row["model"], row["label"], row["text"]) for row in read_rows(path)}
        run = Run(lab.model, lab.tokenizer, lab.name, lab.options)
        question = run.questions(lab.task)[0]
        arms, refused = list(self.arms(lab)), []
        text: Forced | None = None
        for number, arm in enumerate(arms):
            if (lab.name, arm.name, question.digest) in done:
                continue
            tell(number, len(arms), f"{self.name}: {arm.name}")
            text = text or Forced(0, question.ids, written(lab, question.ids))
            try:
                row = course(lab, arm, text)
            except (UsageError, PolicyError) as error:
                refused.append(f"{arm.name}: {str(error).splitlines()[0]}")
                continue
            append_row(path, {"kvpolicy_kept": 1, "model": lab.name, "text": question.digest, **row})
        tell(len(arms), len(arms), "done")
        return refused

    def tell(self, rows: Rows) -> Found:
        heats = [Heat(row["label"], row["cells"], row["steps"], row["prompt_tokens"] / row["tokens"]) for row in rows]
        return Found([_table(rows)], heats=heats, findings=list(_findings(rows, self.unified)))


def written(lab: Lab, prompt: Tensor) -> Tensor:
    """What the model writes after a prompt [N] with transformers' own cache, greedily: token ids [M]."""
    ids = prompt[None].to(lab.model.device)
    pad = getattr(lab.tokenizer, "pad_token_id", None)
    text = lab.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=lab.new, do_sample=False, pad_token_id=pad
    )
    found: Tensor = text[0, len(prompt) :].cpu()
    return found


@torch.no_grad()
def course(lab: Lab, arm: Arm, text: Forced) -> dict[str, Any]:
    """Which tokens of a text an arm holds at some moments, as the row that is kept of it.

    Raises:
        UsageError, PolicyError: the arm cannot run.
    """
    prompt, steps = len(text.prompt), len(text.output)
    found = bound(arm, lab.geometry, prompt=prompt, max_new_tokens=steps)
    moments = set(sampled(steps, MOMENTS))
    tokens = prompt + steps - 1
    cut = edges(tokens, CELLS)
    cells: list[list[float | None]] = []
    of_prompt: list[float] = []
    with applied(lab.model, found.policy, compile=False, special_tokens=lab.tokenizer, generic=lab.options.generic):
        cache = cache_for(lab.model, prompt=prompt, max_new_tokens=steps)
        for step in _led(lab.model, cache, text):
            if step in moments:
                held = shares(cache, tokens)
                cells.append(_cells(held, cut, prompt + step))
                of_prompt.append(float(held[:prompt].sum() / held.sum()))
    return {
        "label": arm.name, "settings": dict(found.settings), "prompt_tokens": prompt, "steps": steps, "tokens": tokens,
        "held": found.held, "of_prompt": [round(share, 4) for share in of_prompt], "cells": cells,
    }  # fmt: skip


def _led(model: Any, cache: PolicyCache, text: Forced) -> Iterator[int]:
    """The text through an empty cache, its output token by token; yields how many of these are in it."""
    model(text.prompt[None].to(cache.device), past_key_values=cache, logits_to_keep=1)
    yield 0
    stepper = Stepper(model, cache)
    for step, token in enumerate(text.output[:-1], 1):
        stepper.step(token.to(cache.device)[None, None])
        yield step


def shares(cache: PolicyCache, tokens: int) -> Tensor:
    """Of each token [tokens], how many of all layers and KV heads hold it, 0 to 1; of the first row."""
    count, heads = torch.zeros(tokens), 0
    for part in cache.parts():
        position = part.state.all_positions[0].cpu()
        heads += position.shape[0]
        known = position[(position >= 0) & (position < tokens)].long()
        count += torch.bincount(known, minlength=tokens)
    return count / heads


def _cells(held: Tensor, cut: Sequence[int], said: int) -> list[float | None]:
    """By stretch, the share of its tokens that is held; None where none of them has been said."""
    found: list[float | None] = []
    for start, stop in pairwise(cut):
        last = min(stop, said)
        found.append(None if last <= start else round(float(held[start:last].mean()), 2))
    return found


def _table(rows: Rows) -> Table:
    columns = ["", "held", "of them prompt, %: at first", "in the middle", "at the end"]
    lines = [
        [row["label"], f"{row['held']:,}", *(f"{100 * row['of_prompt'][at]:.0f}" for at in _times(row))] for row in rows
    ]
    return Table("The prompt among what is held, over all layers and KV heads of one text", columns, lines)


def _times(row: Any) -> tuple[int, int, int]:
    return 0, len(row["of_prompt"]) // 2, -1


def _findings(rows: Rows, unified: Sequence[str]) -> Iterator[Finding]:
    """Whether the prompt loses its places where it competes with what is generated. One text: no interval."""
    for row in rows:
        if row["label"].partition(" at ")[0] not in unified:
            continue
        share = row["prompt_tokens"] / row["tokens"]
        end = row["of_prompt"][-1]
        word = Word.HOLDS if end < share else Word.FAILS
        yield Finding(
            f"{row['label']}: what is generated drives the prompt out",
            word,
            f"At the end {end:.0%} of what it holds is prompt, which is {share:.0%} of the text (one text).",
        )
