"""Other answers for some layers or KV heads."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import GetJsonSchemaHandler, StrictBool, ValidationInfo, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from kvpolicy.errors import PolicyError
from kvpolicy.language.base import Complaint, OneOrMany, Strict
from kvpolicy.language.pool import Pool

LAYERS = r"^(-?[0-9]{1,4})(?:\.\.(-?[0-9]{1,4}))?$"


class LayerRange(Strict):
    """Layers first..last, both included; negative numbers count from the end."""

    first: int
    last: int

    @model_validator(mode="before")
    @classmethod
    def _spell(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, cls) or info.context is None:
            return data
        match = re.fullmatch(LAYERS, data) if isinstance(data, str) else None
        if match is None:
            raise Complaint("layers are a number or a range", "as in `3`, `0..3` (both included), `-1` (the last)")
        first, last = int(match[1]), int(match[2] or match[1])
        if (first < 0) == (last < 0) and first > last:
            raise Complaint(f"the range {data} is empty", f"write `{last}..{first}`")
        return {"first": first, "last": last}

    def covers(self, layer: int, layers: int) -> bool:
        """Whether `layer` of a model with `layers` layers is meant."""
        return self._index(self.first, layers) <= layer <= self._index(self.last, layers)

    def misses(self, layers: int) -> bool:
        """Whether a model with `layers` layers has none of these."""
        return self._index(self.first, layers) >= layers or self._index(self.last, layers) < 0

    @staticmethod
    def _index(number: int, layers: int) -> int:
        return number + layers if number < 0 else number

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": ["integer", "string"], "pattern": LAYERS, "description": cls.__doc__}

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}..{self.last}"


Layers = Annotated[tuple[LayerRange, ...], OneOrMany()]


class Override(Strict):
    """Other answers for some layers or heads; later overrides go over earlier ones."""

    EXAMPLE = "{layers: 0..1, dense: true}"
    NOUN = "an override"

    layers: Layers | None = None
    """the layers meant: a number, a range, or a list of these"""

    heads: tuple[tuple[int, int], ...] | None = None
    """the KV heads meant, as pairs [layer, head]"""

    dense: StrictBool = False
    """whether these keep everything"""

    pools: dict[str, Pool | None] | None = None
    """keys of pools that differ; `null` gives a key its default back, or removes a pool"""

    @model_validator(mode="after")
    def _one_each(self) -> Override:
        self._choose("layers", "heads", "names `layers` or `heads`")
        self._choose("dense", "pools", "says `dense: true` or `pools`")
        return self

    def _choose(self, one: str, other: str, need: str) -> None:
        """Complain unless exactly one of two keys is given, and says something."""
        first, second = getattr(self, one), getattr(self, other)
        if first not in (None, False) and second is not None:
            raise Complaint(f"`{one}` and `{other}` answer the same question", "keep one of them", (other,), "key")
        if first in (None, False) and second is None:
            raise Complaint(f"an override {need}", f"as in `{self.EXAMPLE}`")
        if () in (first, second):
            empty = one if first == () else other
            raise Complaint(f"`{empty}` names none", f"as in `{self.EXAMPLE}`", (empty,))

    def applies(self, layer: int, layers: int, head: int | None) -> bool:
        """Whether it is about this layer and head; no head means that of most heads."""
        if self.layers is not None:
            return any(part.covers(layer, layers) for part in self.layers)
        return head is not None and any((at % layers, h) == (layer, head) for at, h in self.heads or ())

    def check(self, layers: int) -> None:
        """Raise PolicyError where it names a layer that a model with `layers` layers does not have."""
        absent = [str(part) for part in self.layers or () if part.misses(layers)]
        absent += [str(layer) for layer, _ in self.heads or () if not -layers <= layer < layers]
        if absent:
            raise PolicyError(f"an override is about layer {absent[0]}, but the model has layers 0..{layers - 1}")


def overridden(pools: dict[str, Pool], patches: dict[str, Pool | None]) -> dict[str, Pool]:
    """Pools with an override's keys put in; None removes a pool, a new name adds one."""
    result = dict(pools)
    for name, patch in patches.items():
        if patch is None:
            result.pop(name, None)
        else:
            result[name] = result[name].patched(patch) if name in result else patch
    return result
