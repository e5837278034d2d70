"""Synthetic attention: seeded queries, keys and values that attend as a named pattern says.

``synthesize({"pattern": "milestone", "prompt": 16, "steps": 160, "at": 40, "until": 90})``. The keys have length 1
(but for ``short-keys``), and their products with the queries are the wanted attention, so that page bounds, norms and
softmaxes all mean something.
``generators.py`` holds one function per pattern, ``scene.py`` what they are made of; ``mixture.py`` puts patterns
together, ``adversary.py`` makes them up as a policy goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvpolicy.testing.arguments import READERS, known, read_arguments, within
from kvpolicy.testing.attention import Attention
from kvpolicy.testing.patterns.adversary import Against, provoke
from kvpolicy.testing.patterns.generators import PATTERNS
from kvpolicy.testing.patterns.mixture import read_pattern
from kvpolicy.testing.patterns.scene import Scene, room
from kvpolicy.testing.patterns.shape import Shape

__all__ = ["PATTERNS", "Attention", "Scene", "synthesize"]


def synthesize(arguments: Mapping[str, Any], against: Against = None) -> Attention:
    """The attention of a test.

    Args:
        arguments: ``pattern``, its own arguments (those of its function), and any of ``prompt`` (16 tokens, or a list:
            one number a row), ``steps`` (64 generated tokens), ``layers`` (2), ``heads`` (4 query heads), ``kv_heads``
            (2), ``head_dim`` (enough), ``rows`` (1), ``seed`` (0), ``noise`` (0.25: the standard deviation of what is
            added to each logit), ``seen_by`` (the query heads that see the pattern; all), ``turns`` (later prompts,
            see ``turns.py``; none), ``chunk`` (prompts come in passes of at most so many columns; 0: each in one),
            ``special`` and ``images`` (positions; what of a prompt lies there is special, or an image's; none).
        against: gives the plan of the policy that `adversarial` works against.

    Raises:
        Complaint: an argument that is unknown, missing, or makes no sense; its path names it.
    """
    common = {key: arguments[key] for key in known(Shape) if key in arguments}
    own = {key: value for key, value in arguments.items() if key not in common}
    shape = Shape(**read_arguments(Shape, common, READERS))
    draw, given = read_pattern(own, shape, against)
    rows = [[shape.scene(row, layer) for layer in range(shape.layers)] for row in range(len(shape.prompts))]
    for scene in (scene for row in rows for scene in row):
        draw(scene, **given)
    with within("head_dim"):
        size = room(max(scene.dims for row in rows for scene in row), shape.head_dim)
    shape.check_size(size)
    made = [[scene.realise(shape.kv_heads, size, shape.sees) for scene in row] for row in rows]
    said = Attention(
        prompts=shape.prompts,
        steps=shape.steps,
        queries=tuple(np.stack([layer.queries for layer in row]) for row in made),
        keys=tuple(np.stack([layer.keys for layer in row]) for row in made),
        values=tuple(np.stack([layer.values for layer in row]) for row in made),
        turns=shape.turns,
        chunk=shape.chunk,
        special=shape.special,
        images=shape.images,
    )
    if any(scene.late for row in rows for scene in row):
        provoke(said, rows, shape.sees, against)
    return said
