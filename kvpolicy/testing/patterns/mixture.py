"""Several patterns in one text: each in some layers, heads and rows, for some time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpolicy.language.base import Complaint
from kvpolicy.language.nodes import shown
from kvpolicy.language.vocabulary import nearest
from kvpolicy.testing.arguments import READERS, Places, known, read_arguments, within
from kvpolicy.testing.patterns.generators import PATTERNS, pattern
from kvpolicy.testing.patterns.scene import Array, Scene
from kvpolicy.testing.patterns.shape import Shape
from kvpolicy.testing.tokens import read_tokens


@dataclass(frozen=True)
class Where:
    """Which queries a part is about: those at the positions ``from`` to ``until``, of these layers, heads and rows.

    ``heads`` are query heads; ``kv_heads`` names all query heads of a KV head at once. None named: all.
    """

    layers: Places = ()
    heads: Places = ()
    kv_heads: Places = ()
    rows: Places = ()
    from_: int = 0
    until: int | None = None

    def check(self, shape: Shape) -> None:
        """Raise Complaint where there is no such query."""
        counts = {"layers": shape.layers, "heads": shape.heads, "kv_heads": shape.kv_heads, "rows": len(shape.prompts)}
        for name, count in counts.items():
            if any(number >= count for number in getattr(self, name)):
                raise Complaint(f"the {name.replace('kv_', 'KV ')} are 0..{count - 1}", path=(name,))
        for name, moment in (("from", self.from_), ("until", self.until)):
            if moment is not None and moment >= shape.length:
                reason = f"position {moment} is never said"
                raise Complaint(reason, f"the text's positions are 0..{shape.length - 1}", (name,))
        if self.until is not None and self.until < self.from_:
            raise Complaint(f"from {self.from_} until {self.until} is no time", "`until` is later", ("until",))
        group = shape.heads // shape.kv_heads
        if self.heads and self.kv_heads and not {head // group for head in self.heads} & set(self.kv_heads):
            raise Complaint("none of these `heads` belongs to these `kv_heads`", "drop one", ("heads",))

    def asked(self, scene: Scene, group: int) -> Array:
        """The queries [Q, T] bool of a scene; ``group`` query heads share a KV head."""
        here = all(not places or at in places for places, at in ((self.layers, scene.layer), (self.rows, scene.row)))
        head = np.arange(scene.heads)
        heads = np.isin(head, self.heads or head) & np.isin(head // group, self.kv_heads or head // group)
        last = scene.length - 1 if self.until is None else self.until
        time = (scene.now >= self.from_) & (scene.now <= last)
        return here & heads[:, None] & time


@dataclass(frozen=True)
class Part:
    """One part of a mixture: a pattern with its arguments, and the queries that it is about."""

    draw: Callable[..., None]
    given: Mapping[str, Any]
    where: Where
    group: int


Parts = tuple[Part, ...]


@pattern("parts: [{pattern: sink, sinks: 2}, {pattern: drift, every: 6, width: 2, level: 6, where: {from: 16}}]")
def mixture(scene: Scene, parts: Parts) -> None:
    """Several patterns at once: each of the ``parts`` is a pattern with its own arguments and, under ``where``, the
    ``layers``, query ``heads`` or ``kv_heads``, ``rows`` and the time, ``from`` and ``until``, in which it holds. Where
    parts meet, what they want of a token adds up.
    """
    for index, part in enumerate(parts):
        asked = part.where.asked(scene, part.group)
        if asked.any():
            with scene.about(asked), within("parts", index):
                part.draw(scene, **part.given)


def read_pattern(
    arguments: Mapping[str, Any], shape: Shape, against: Any
) -> tuple[Callable[..., None], dict[str, Any]]:
    """The function that draws a pattern, and its keyword arguments. ``against`` is what a pattern is told of a policy.

    Raises:
        Complaint: an argument that is unknown, missing, or makes no sense.
    """
    own = {key: value for key, value in arguments.items() if key != "pattern"}
    name = arguments["pattern"]
    if name not in PATTERNS:
        raise Complaint(f"no pattern is called `{shown(name)}`", nearest(str(name), PATTERNS), ("pattern",))
    draw = PATTERNS[name]
    readers = {
        **READERS,
        "Tokens": lambda value: read_tokens(value, shape.length),
        "Parts": lambda value: read_parts(value, shape, against),
    }
    given = read_arguments(draw, own, readers, beside=known(Shape))
    return draw, {**given, **({"against": against} if "against" in draw.__annotations__ else {})}


def read_parts(value: Any, shape: Shape, against: Any) -> Parts:
    """The parts of a mixture. Raises Complaint."""
    hint = "as in `parts: [{pattern: sink}, {pattern: drift, where: {layers: 0..1}}]`"
    if not isinstance(value, list | tuple) or not value:
        raise Complaint("a mixture has a list of parts", hint)
    parts = []
    for index, item in enumerate(value):
        with within(index):
            if not isinstance(item, Mapping) or "pattern" not in item:
                raise Complaint("a part names a `pattern`", hint)
            parts.append(_read_part(item, shape, against))
    return tuple(parts)


def _read_part(item: Mapping[str, Any], shape: Shape, against: Any) -> Part:
    own = {key: value for key, value in item.items() if key != "where"}
    takes = known(PATTERNS[item["pattern"]]) if item["pattern"] in PATTERNS else []
    for key in own:
        if key not in takes and key in known(Where):
            hint = f"as in `where: {{{key}: {shown(own[key])}}}`"
            raise Complaint(f"`{key}` of a part is said under `where`", hint, (key,), "key")
        if key not in takes and key in known(Shape):
            raise Complaint(f"`{key}` is said once, for all parts", "write it beside `parts`", (key,), "key")
    draw, given = read_pattern(own, shape, against)
    with within("where"):
        written = item.get("where", {})
        if not isinstance(written, Mapping):
            raise Complaint("`where` is a mapping", "as in `where: {layers: 0..1, from: 40}`")
        where = Where(**read_arguments(Where, written, READERS))
        where.check(shape)
    return Part(draw, given, where, shape.heads // shape.kv_heads)
