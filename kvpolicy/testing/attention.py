"""What is said to a policy: the queries, keys and values of a text, from patterns and traces alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvpolicy.plan import ModelGeometry
from kvpolicy.testing.turns import Turn, of_prompts

Array = np.ndarray


@dataclass(frozen=True)
class Attention:
    """What the rows of a batch say, one item a row.

    queries [L, Q, T, D], keys [L, K, T, D] and values [L, K, T, D] of L layers, float32, in order of position: a row's
    prompt, then ``steps`` generated tokens, interrupted by later ``turns``. Prompts come in passes of at most ``chunk``
    columns (0: each in one). Times ``scale``, queries times keys are the wanted logits.
    ``scaling`` is what a recorded model multiplies them with; None is D ** -0.5. ``special`` and ``images`` are
    positions: the prompt tokens of every row that lie there are special, or an image's.
    """

    prompts: tuple[int, ...]
    steps: int
    queries: tuple[Array, ...]
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    scaling: float | None = None
    turns: tuple[Turn, ...] = ()
    chunk: int = 0
    special: tuple[int, ...] = ()
    images: tuple[int, ...] = ()

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

    @cached_property
    def kinds(self) -> tuple[dict[str, Array], ...]:
        """By row: which of its tokens [T] are of the kinds "prompt", "generated", "special" and "image"."""
        return tuple(self._kinds(row) for row in range(self.rows))

    def _kinds(self, row: int) -> dict[str, Array]:
        prompts = of_prompts(row, self.prompts, self.turns, self.steps)
        places = np.arange(len(prompts))
        special, image = np.isin(places, self.special), np.isin(places, self.images)
        return {"prompt": prompts, "generated": ~prompts, "special": prompts & special, "image": prompts & image}

    @property
    def geometry(self) -> ModelGeometry:
        """The shape of the model that would attend so."""
        layers, query_heads, _, head_dim = self.queries[0].shape
        return ModelGeometry("synthetic", layers, query_heads, self.keys[0].shape[1], head_dim)
