"""The arguments that every pattern takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvpolicy.language.base import Complaint
from kvpolicy.testing.arguments import Numbers, Places
from kvpolicy.testing.patterns.scene import Scene
from kvpolicy.testing.turns import Turns, check_turns, of_prompts

MOST = 2**27
"""Numbers in the queries of one row; more is a slip of the pen."""


@dataclass(frozen=True)
class Shape:
    """The arguments that every pattern takes; ``synthesize`` says what they mean."""

    prompt: Numbers = (16,)
    steps: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 0
    rows: int = 1
    seed: int = 0
    noise: float = 0.25
    seen_by: Numbers = ()
    turns: Turns = ()
    chunk: int = 0
    special: Places = ()
    images: Places = ()

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "kv_heads", "rows"):
            if not getattr(self, name):
                raise Complaint(f"`{name}` is at least 1", path=(name,))
        if self.heads % self.kv_heads:
            hint = f"`heads` is a multiple of `kv_heads`, as in `heads: {2 * self.kv_heads}`"
            raise Complaint(f"{self.heads} query heads cannot share {self.kv_heads} KV heads evenly", hint, ("heads",))
        if len(self.prompt) > 1 and self.rows not in (1, len(self.prompt)):
            raise Complaint(f"{len(self.prompt)} prompts for {self.rows} rows", "`prompt` lists one a row", ("rows",))
        if min(self.prompts) + self.steps == 0:
            raise Complaint("a text of no tokens", "`prompt` and `steps` say how many", ("prompt",))
        if any(head >= self.heads for head in self.seen_by):
            raise Complaint(f"query heads are 0..{self.heads - 1}", path=("seen_by",))
        self.check_size(16)
        check_turns(self.turns, len(self.prompts), self.steps)
        for name in ("special", "images"):
            self._check_flags(name, getattr(self, name))

    def check_size(self, head_dim: int) -> None:
        """Raise Complaint where heads of this size make more text than a test can hold."""
        if self.layers * self.heads * (max(self.prompts) + self.steps) * head_dim > MOST:
            raise Complaint("more text than a test can hold", "use fewer `steps`", ("steps",))

    def _check_flags(self, name: str, places: Places) -> None:
        """Raise Complaint where a position is of no row's prompt."""
        rows = [
            set(np.flatnonzero(of_prompts(row, self.prompts, self.turns, self.steps)))
            for row in range(len(self.prompts))
        ]
        for place in places:
            if not any(place in row for row in rows):
                hint = "a generated token is generated and nothing else"
                raise Complaint(f"position {place} is in no row's prompt", hint, (name,))

    @property
    def prompts(self) -> tuple[int, ...]:
        """Prompt tokens by row."""
        return self.prompt if len(self.prompt) > 1 else self.prompt * self.rows

    @property
    def later(self) -> tuple[int, ...]:
        """Prompt tokens by row that later turns bring."""
        rows = len(self.prompts)
        return tuple(sum(turn.rows(rows)[row] for turn in self.turns) for row in range(rows))

    @property
    def length(self) -> int:
        """Tokens of the shortest row."""
        return min(map(sum, zip(self.prompts, self.later, strict=True))) + self.steps

    @property
    def sees(self) -> list[bool]:
        """Which query heads see the pattern."""
        return [not self.seen_by or head in self.seen_by for head in range(self.heads)]

    def scene(self, row: int, layer: int) -> Scene:
        """An empty scene with random numbers of its own."""
        return Scene(
            self.prompts[row],
            self.later[row] + self.steps,
            np.random.default_rng([self.seed, row, layer]),
            self.noise,
            self.heads,
            row,
            layer,
        )
