"""Synthetic attention: seeded queries, keys and values that attend as a named pattern says.

``synthesize({"pattern": "milestone", "prompt": 16, "steps": 160, "at": 40, "until": 90})``. The keys have length 1, and
their products with the queries are the wanted attention, so that page bounds, norms and softmaxes all mean something.
``generators.py`` holds one function per pattern, ``scene.py`` what they are made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpolicy.language.base import Complaint
from kvpolicy.language.nodes import shown
from kvpolicy.language.vocabulary import nearest
from kvpolicy.plan import ModelGeometry
from kvpolicy.testing.arguments import READERS, Numbers, known, read_arguments, within
from kvpolicy.testing.patterns.generators import PATTERNS
from kvpolicy.testing.patterns.scene import Array, Scene, room
from kvpolicy.testing.tokens import read_tokens
from kvpolicy.testing.turns import Turn, Turns, check_turns

__all__ = ["PATTERNS", "Attention", "Scene", "synthesize"]

MOST = 2**27
"""Numbers in the queries of one row; more is a slip of the pen."""


@dataclass(frozen=True)
class Attention:
    """What the rows of a batch say, one item a row.

    queries [L, Q, T, D], keys [L, K, T, D] and values [L, K, T, D] of L layers, float32, in order of position: a row's
    prompt, then ``steps`` generated tokens, interrupted by later ``turns``. Prompts come in passes of at most ``chunk``
    columns (0: each in one). Times ``scale``, queries times keys are the wanted logits.
    ``scaling`` is what a recorded model multiplies them with; None is D ** -0.5.
    """

    prompts: tuple[int, ...]
    steps: int
    queries: tuple[Array, ...]
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    scaling: float | None = None
    turns: tuple[Turn, ...] = ()
    chunk: int = 0

    @property
    def scale(self) -> float:
        """What the products of queries and keys are multiplied with."""
        return self.geometry.head_dim**-0.5 if self.scaling is None else self.scaling

    @property
    def rows(self) -> int:
        return len(self.prompts)

    @property
    def length(self) -> int:
        """Tokens of the shortest row."""
        return min(self.prompt_totals) + self.steps

    @property
    def prompt_totals(self) -> tuple[int, ...]:
        """Prompt tokens by row, over all turns."""
        brought = [self.prompts, *(turn.rows(self.rows) for turn in self.turns)]
        return tuple(sum(tokens) for tokens in zip(*brought, strict=True))

    @property
    def geometry(self) -> ModelGeometry:
        """The shape of the model that would attend so."""
        layers, query_heads, _, head_dim = self.queries[0].shape
        return ModelGeometry("synthetic", layers, query_heads, self.keys[0].shape[1], head_dim)


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
        if self.layers * self.heads * (max(self.prompts) + self.steps) > MOST // 16:
            raise Complaint("more text than a test can hold", "use fewer `steps`", ("steps",))
        check_turns(self.turns, len(self.prompts), self.steps)

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
    def sees(self) -> list[bool]:
        """Which query heads see the pattern."""
        return [not self.seen_by or head in self.seen_by for head in range(self.heads)]

    def scene(self, row: int, layer: int) -> Scene:
        """An empty scene with random numbers of its own."""
        return Scene(
            self.prompts[row], self.later[row] + self.steps, np.random.default_rng([self.seed, row, layer]), self.noise
        )


def synthesize(arguments: Mapping[str, Any]) -> Attention:
    """The attention of a test.

    Args:
        arguments: ``pattern``, its own arguments (those of its function), and any of ``prompt`` (16 tokens, or a list:
            one number a row), ``steps`` (64 generated tokens), ``layers`` (2), ``heads`` (4 query heads), ``kv_heads``
            (2), ``head_dim`` (enough), ``rows`` (1), ``seed`` (0), ``noise`` (0.25: the standard deviation of what is
            added to each logit), ``seen_by`` (the query heads that see the pattern; all), ``turns`` (later prompts,
            see ``turns.py``; none), ``chunk`` (prompts come in passes of at most so many columns; 0: each in one).

    Raises:
        Complaint: an argument that is unknown, missing, or makes no sense; its path names it.
    """
    own = {key: value for key, value in arguments.items() if key != "pattern"}
    common = {key: own.pop(key) for key in known(Shape) if key in own}
    name = arguments["pattern"]
    if name not in PATTERNS:
        raise Complaint(f"no pattern is called `{shown(name)}`", nearest(str(name), PATTERNS), ("pattern",))
    shape = Shape(**read_arguments(Shape, common, READERS))
    draw, length = PATTERNS[name], min(map(sum, zip(shape.prompts, shape.later, strict=True))) + shape.steps
    given = read_arguments(draw, own, {**READERS, "Tokens": lambda at: read_tokens(at, length)}, beside=known(Shape))
    rows = [[shape.scene(row, layer) for layer in range(shape.layers)] for row in range(len(shape.prompts))]
    for scene in (scene for row in rows for scene in row):
        draw(scene, **given)
    with within("head_dim"):
        size = room(max(scene.dims for row in rows for scene in row), shape.head_dim)
    made = [[scene.realise(shape.kv_heads, size, shape.sees) for scene in row] for row in rows]
    return Attention(
        prompts=shape.prompts,
        steps=shape.steps,
        queries=tuple(np.stack([layer.queries for layer in row]) for row in made),
        keys=tuple(np.stack([layer.keys for layer in row]) for row in made),
        values=tuple(np.stack([layer.values for layer in row]) for row in made),
        turns=shape.turns,
        chunk=shape.chunk,
    )
