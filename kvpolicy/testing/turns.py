"""Later prompt turns of a text, as tests write them: `turns: [{after: 12, prompt: 5}, {after: 9, prompt: [3, 0]}]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpolicy.language.base import Complaint
from kvpolicy.language.nodes import shown
from kvpolicy.testing.tokens import numbers, whole


@dataclass(frozen=True)
class Turn:
    """Another prompt: ``after`` so many generated tokens since the last one, each row brings ``prompt`` tokens."""

    after: int
    prompt: tuple[int, ...]

    def rows(self, count: int) -> tuple[int, ...]:
        """Its tokens by row."""
        return self.prompt if len(self.prompt) > 1 else self.prompt * count


Turns = tuple[Turn, ...]


def of_prompts(row: int, prompts: tuple[int, ...], turns: Turns, steps: int) -> np.ndarray:
    """Which tokens [T] of a row are of its first prompt or of a later turn's; the others are generated."""
    brought = [prompts[row], *(turn.rows(len(prompts))[row] for turn in turns)]
    pauses = [turn.after for turn in turns]
    counts = zip(brought, [*pauses, steps - sum(pauses)], strict=True)
    return np.concatenate([np.repeat([True, False], pair) for pair in counts])


def read_turns(value: Any) -> Turns:
    """A list of turns. Raises Complaint."""
    hint = "as in `turns: [{after: 12, prompt: 5}]`"
    if not isinstance(value, list | tuple):
        raise Complaint(f"`{shown(value)}` is no list of turns", hint)
    turns = []
    for index, item in enumerate(value):
        if not isinstance(item, Mapping) or set(item) != {"after", "prompt"}:
            raise Complaint("a turn says `after` how many generated tokens it comes, and its `prompt`", hint, (index,))
        turns.append(Turn(whole(item["after"]), numbers(item["prompt"])))
    return tuple(turns)


def check_turns(turns: Turns, rows: int, steps: int) -> None:
    """Raise Complaint where they do not fit a text."""
    for index, turn in enumerate(turns):
        if len(turn.prompt) not in (1, rows):
            hint = "one number for all, or one a row"
            raise Complaint(f"{len(turn.prompt)} prompts for {rows} rows", hint, ("turns", index, "prompt"))
        if not any(turn.prompt):
            raise Complaint("a turn that brings nothing", "as in `prompt: 5`", ("turns", index, "prompt"))
    if sum(turn.after for turn in turns) > steps:
        raise Complaint(f"only {steps} tokens are generated, and a turn comes later", "use more `steps`", ("turns",))
