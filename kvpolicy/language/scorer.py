"""How the tokens of a pool are ranked: a signal, and the stages it goes through."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import floor
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from kvpolicy.errors import UsageError
from kvpolicy.language.base import Complaint, Spelled, Strict, Words
from kvpolicy.language.nodes import shown
from kvpolicy.language.quantity import Quantity
from kvpolicy.language.scope import ONE, ZERO, Count, FixedNumber, FixedShare, Role, Share
from kvpolicy.language.signals import SignalArgument, definition, signal_names
from kvpolicy.language.vocabulary import nearest


class Signal(Strict):
    """What is measured about each token: a signal's name, or its name with arguments."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _spell(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, cls) or (info.context is None and isinstance(data, dict) and "name" in data):
            return data
        name: object = data
        if isinstance(data, dict) and len(data) == 1:
            name = next(iter(data))
        if not isinstance(name, str):
            raise Complaint("the name of one signal expected", "as in `attention` or `{random: {seed: 0}}`")
        on, path = ("key", (name,)) if isinstance(data, dict) else ("value", ())
        if name not in signal_names():
            raise Complaint(f"no signal is named `{shown(name)}`", nearest(name, signal_names()), path, on)
        try:
            known = definition(name).arguments
        except UsageError as error:  # a plug-in that is broken
            raise Complaint(str(error), "", path, on) from None
        given = data[name] if isinstance(data, dict) else {}
        if not isinstance(given, dict):
            raise Complaint(f"`{name}` takes its arguments as a mapping", f"as in `{name}: {{…}}`", path)
        return {"name": str(name), "args": arguments(str(name), known, given, info)}

    @field_serializer("args")
    def _args(self, args: dict[str, Any]) -> dict[str, Any]:
        return {key: value.canonical if isinstance(value, Quantity) else value for key, value in args.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        names: list[JsonSchemaValue] = []
        for name in signal_names():
            try:
                signal = definition(name)
            except UsageError as error:  # a plug-in that is broken: known by name
                names.append({"const": name, "description": str(error)})
                continue
            names.append({"const": name, "description": signal.meaning})
            if signal.arguments:
                inner = {key: argument_schema(argument) for key, argument in signal.arguments.items()}
                value = {"type": "object", "properties": inner, "additionalProperties": False}
                names.append({"type": "object", "properties": {name: value}, "required": [name], "maxProperties": 1})
        known = signal_names()
        plugin = {"type": "object", "propertyNames": {"not": {"enum": known}}, "minProperties": 1, "maxProperties": 1}
        names += [{"type": "string", "not": {"enum": known}, "description": "a plug-in's signal"}, plugin]
        return {"anyOf": names, "description": (cls.__doc__ or "").strip(), "title": "Signal"}


def argument_schema(argument: SignalArgument) -> JsonSchemaValue:
    shape: JsonSchemaValue = {"enum": list(argument.words)} if argument.words else {"type": ["number", "string"]}
    return {**shape, "description": argument.meaning, "default": str(argument.default)}


def arguments(
    name: str, known: Mapping[str, SignalArgument], given: Mapping[str, object], info: ValidationInfo
) -> dict[str, object]:
    """A signal's arguments, with defaults filled in."""
    taken: dict[str, object] = {key: argument.default for key, argument in known.items()}
    for key, value in given.items():
        if key not in known:
            hint = nearest(key, known) if known else f"`{name}` takes none"
            raise Complaint(f"`{name}` has no argument `{shown(key)}`", hint, (name, key), "key")
        words = known[key].words
        if words and value not in words:
            raise Complaint(f"`{key}` is {' or '.join(words)}, not `{shown(value)}`", "", (name, key))
        taken[key] = str(value) if words else number(value, info, (name, key), known[key].least)
    return taken


def number(value: object, info: ValidationInfo, path: tuple[str | int, ...], least: Fraction | None = None) -> Quantity:
    """A number known when the plan is made; complaints are placed at `path`."""
    try:
        return Role("number", "plan", least, name=str(path[-1])).read(value, info)
    except Complaint as complaint:
        complaint.path = path
        raise


class Queries(Spelled):
    """Which queries the signal listens to."""

    WORDS: ClassVar[Words] = {
        "current": ("the newest query of the row", {"word": "current"}),
        "all": ("every query of the pass, summed", {"word": "all"}),
    }

    last: Count | None = None
    """the row's newest w queries, averaged; evaluated only when the pool updates"""


class Smooth(Spelled):
    """Smoothing over neighbours: candidates in position order, stride 1, ends padded with zeros."""

    max: Count | None = None
    """the largest score among an odd number of neighbours"""

    mean: Count | None = None
    """the mean score of an odd number of neighbours"""

    @property
    def width(self) -> Quantity:
        width = self.max or self.mean
        assert width is not None
        return width

    @field_validator("max", "mean")
    @classmethod
    def _odd(cls, width: Quantity | None) -> Quantity | None:
        if width is not None and width.constant is not None and width.constant % 2 != 1:
            below = (floor(width.constant) - 1) // 2 * 2 + 1
            near = f"write {below} or {below + 2}" if below > 0 else "write 1 or 3"
            raise Complaint(f"a smoothing width is odd, so that it has a middle; this is {width.canonical}", near)
        return width


class Hit(Spelled):
    """The score becomes 1 for a hit and 0 for the others."""

    top: Share | None = None
    """the best share of the units that `over` names is a hit"""

    above: FixedNumber | None = None
    """a score of at least this is a hit"""

    @property
    def value(self) -> Quantity:
        value = self.top or self.above
        assert value is not None
        return value


class Memory(Spelled):
    """What a unit remembers of its scores over time; it starts when the unit enters the pool."""

    WORDS: ClassVar[Words] = {
        "none": ("this pass's score alone", {"word": "none"}),
        "sum": ("the sum of all scores so far", {"word": "sum"}),
        "last-hit": ("the clock `t` of the last hit, or of entry", {"word": "last-hit"}),
    }

    decay: FixedShare | None = None
    """the sum so far times this, plus the new score"""

    max_decay: Annotated[Quantity, Role("share", "plan", ZERO, ONE, "max-decay")] | None = Field(
        None, alias="max-decay"
    )
    """the larger of the memory times this and the new score"""

    recurrence: FixedNumber | None = None
    """how overdue a hit is against the longest gap between hits, plus this times a bonus for short gaps"""

    @property
    def value(self) -> Quantity | None:
        return self.decay or self.max_decay or self.recurrence


ReducedHeads = Literal["mean", "max", "sum", "logits-max"]


def heads_spelling(value: Any, info: ValidationInfo) -> Any:
    """`{logits: max}` -> "logits-max", the name it goes by inside."""
    if isinstance(value, dict) and list(value) == ["logits"] and value["logits"] == "max":
        return "logits-max"
    if value == "logits-max" and info.context is not None:
        raise Complaint("`logits-max` is written differently", "write `{logits: max}`")
    ways = "one of `mean`, `max`, `sum`, `{logits: max}`"
    if not isinstance(value, str):
        raise Complaint("this is not a value of `heads`", ways)
    if value not in get_args(ReducedHeads):
        near = nearest(value, ("mean", "max", "sum"))
        raise Complaint(f"`{shown(value)}` is not a value of `heads`", near if near.startswith("did") else ways)
    return value


HEADS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"const": "mean"},
        {"const": "max"},
        {"const": "sum"},
        {
            "type": "object",
            "properties": {"logits": {"const": "max"}},
            "required": ["logits"],
            "additionalProperties": False,
            "description": "the logits are maxed before the softmax",
        },
    ]
}
Heads = Annotated[ReducedHeads, BeforeValidator(heads_spelling), WithJsonSchema(HEADS_SCHEMA)]


class Scorer(Strict):
    """A ranking: higher scores stay. Its stages work in the order of these keys."""

    EXAMPLE = "{signal: attention, memory: sum}"
    NOUN = "a scorer"

    signal: Signal | None = None
    """what is measured about each token"""

    queries: Queries = Queries(word="current")
    """which queries the signal listens to"""

    over: Literal["cache", "pool", "candidates"] = "cache"
    """what softmax and ranks run over: all pools, this pool, or its unprotected units"""

    heads: Heads = "mean"
    """how the query heads of one KV head are reduced to one score"""

    smooth: Smooth | None = None
    """smoothing over neighbouring candidates"""

    norm: Literal["max", "softmax", "mass"] | None = None
    """normalisation over candidates: by their maximum, by softmax, or by the share that the best of them hold"""

    hit: Hit | None = None
    """turns scores into hits"""

    memory: Memory = Memory(word="none")
    """what is kept of the scores over time"""

    weight: FixedNumber = Quantity.number(1)
    """the result is multiplied by this; negative where a larger signal is worse"""

    sum: tuple[Scorer, ...] | None = None
    """scorers whose results are added, instead of a signal"""

    product: tuple[Scorer, ...] | None = None
    """scorers whose results are multiplied, instead of a signal"""

    @property
    def parts(self) -> tuple[Scorer, ...]:
        """The scorers that this one combines; none for a signal's."""
        return self.sum or self.product or ()

    @model_validator(mode="after")
    def _one_source(self) -> Scorer:
        given = [key for key in ("signal", "sum", "product") if getattr(self, key) is not None]
        if not given:
            raise Complaint("a scorer needs one of `signal`, `sum`, `product`", f"as in `{self.EXAMPLE}`")
        if len(given) > 1:
            reason = f"`{given[0]}` and `{given[1]}` answer the same question"
            raise Complaint(reason, "keep one of them", (given[1],), "key")
        return self
