"""What names mean in one policy, and how each kind of quantity is read against that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from kvpolicy.language.base import Complaint, KnownMistake
from kvpolicy.language.nodes import shown
from kvpolicy.language.quantity import Quantity
from kvpolicy.language.syntax import Mention, Parsed, QuantityError, parse
from kvpolicy.language.vocabulary import BUILTIN_NAMES, PLAN_NAMES, nearest

PLAN = frozenset(PLAN_NAMES)


@dataclass
class Scope:
    """Params and `let` names of a policy with their values, and its pools; `used` collects what quantities name.

    Names in `broken` have a mistake of their own; what refers to them is not reported again. `pools` is None where
    any pool may be named.
    """

    values: Mapping[str, Quantity] = field(default_factory=dict)
    broken: frozenset[str] = frozenset()
    pools: frozenset[str] | None = None
    used: set[str] = field(default_factory=set)

    def resolve(self, text: str) -> tuple[Quantity, Parsed]:
        """The quantity with params and `let` names put in. Raises Complaint or KnownMistake."""
        try:
            parsed = parse(text)
            self.check_names(parsed.names)
            quantity = Quantity.parse(text).fold(self.values)
            self.check_cosines(parsed)
            quantity.bound({})
        except QuantityError as error:
            offset, width = error.offset, error.width
            if offset is None and text.count("/") - text.count("//") == 1:
                offset = text.index("/")
            raise Complaint(error.reason, error.hint, offset=offset, width=width) from None
        return quantity, parsed

    def check_names(self, names: Iterable[Mention]) -> None:
        consequence = ""
        for name in names:
            self.used.add(name.word)
            if name.word in self.broken:
                consequence = name.word
            elif "(" in name.word:
                self.check_pool(name)
            elif name.word not in self.values and name.word not in BUILTIN_NAMES:
                hint = nearest(name.word, (*self.values, *self.broken, *BUILTIN_NAMES))
                raise Complaint(f"the name `{shown(name.word)}` is unknown", hint, offset=name.offset, width=name.width)
        if consequence:
            raise KnownMistake(consequence)

    def check_pool(self, name: Mention) -> None:
        function, _, pool = name.word.rstrip(")").partition("(")
        if self.pools is not None and pool not in self.pools:
            hint = nearest(pool, self.pools)
            reason = f"`{name.word}` asks for a pool that is not there"
            raise Complaint(reason, hint, offset=name.offset + len(function) + 1, width=len(pool))

    def check_cosines(self, parsed: Parsed) -> None:
        for call in parsed.calls:
            inside = [name for name in parsed.names if call.offset <= name.offset < call.offset + call.width]
            late = [name for name in inside if self.reads(name.word) - PLAN]
            if call.word == "cos" and late:
                reason = f"`cos` is computed when the plan is made, but `{late[0].word}` changes while text grows"
                raise Complaint(reason, f"it may use {listed(PLAN_NAMES)}", offset=call.offset, width=call.width)

    def reads(self, name: str) -> frozenset[str]:
        """The built-in names that a name stands for."""
        return self.values[name].names if name in self.values else frozenset({name})


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def amount(value: object) -> str:
    """A bound as messages show it: a whole number, or a short decimal."""
    number = float(value) if isinstance(value, (int, float, Fraction)) else 0.0
    return f"{number:g}" if abs(number) < 1e6 else f"{number:.0f}"


@dataclass(frozen=True)
class Role:
    """What a quantity counts, when it must be known, and within which limits it makes sense."""

    unit: Literal["tokens", "count", "share", "number"]
    when: Literal["plan", "pass"] = "pass"
    least: Fraction | None = None
    most: Fraction | None = None
    name: str = ""
    """What messages call it, where that is not the field's own name."""

    def read(self, value: object, info: ValidationInfo) -> Quantity:
        """Read a scalar, or take a quantity, in the scope that the validation's context gives."""
        name = self.name or info.field_name or "this"
        if isinstance(value, bool) or not isinstance(value, (str, int, float, Fraction, Quantity)):
            kinds = {dict: "a mapping", list: "a list", bool: f"`{value}`".lower()}
            found = kinds.get(type(value), f"`{shown(value)}`")
            raise Complaint(f"`{name}` is a number or an expression, but this is {found}")
        scope = info.context if isinstance(info.context, Scope) else Scope()
        text = str(value)
        quantity, parsed = scope.resolve(text)
        self.check_time(quantity, parsed, scope, name)
        self.check_share(quantity, parsed, text, name)
        self.check_limits(quantity, name)
        return quantity

    def check_time(self, quantity: Quantity, parsed: Parsed, scope: Scope, name: str) -> None:
        late = quantity.names - PLAN
        if self.when == "pass" or not late:
            return
        culprit = next(mention for mention in parsed.names if scope.reads(mention.word) & late)
        reads = "" if culprit.word in late else f" reads `{min(scope.reads(culprit.word) & late)}`, which"
        reason = f"`{name}` must be known when the plan is made, but `{culprit.word}`{reads} changes while text grows"
        raise Complaint(reason, f"it may use {listed(PLAN_NAMES)}", offset=culprit.offset, width=culprit.width)

    def check_share(self, quantity: Quantity, parsed: Parsed, text: str, name: str) -> None:
        if self.unit not in ("tokens", "count") or not quantity.share:
            return
        mark = parsed.shares[0] if parsed.shares else Mention(text, 0, len(text))
        hint = f"write `{quantity.text} * prompt_len`" if self.when == "pass" else "write a whole number"
        reason = f"a share of what? {quantity.text} is no number for `{name}`"
        raise Complaint(reason, hint, offset=mark.offset, width=mark.width)

    def check_limits(self, quantity: Quantity, name: str) -> None:
        bound = quantity.bound({})
        if self.least is not None and bound.high < self.least:
            what = "is" if bound.point is not None else "is never more than"
            raise Complaint(f"`{name}` {what} {amount(bound.high)}; the least that makes sense is {amount(self.least)}")
        if self.most is not None and bound.low > self.most:
            what = "is" if bound.point is not None else "is never less than"
            hint = "a share lies between 0 and 1: write `50%` for one half" if self.unit == "share" else ""
            raise Complaint(
                f"`{name}` {what} {amount(bound.low)}; the most that makes sense is {amount(self.most)}", hint
            )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        canonical = core_schema.plain_serializer_function_ser_schema(lambda quantity: quantity.canonical)
        return core_schema.with_info_plain_validator_function(self.read, serialization=canonical)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": ["number", "string"], "x-unit": self.unit, "x-known": self.when}


ZERO, ONE = Fraction(0), Fraction(1)

Tokens = Annotated[Quantity, Role("tokens", least=ONE)]
"""A number of tokens, 1 or more somewhere in its range."""

Reach = Annotated[Quantity, Role("tokens", least=ZERO)]
"""A number of tokens that may be 0: then it says nothing."""

Fixed = Annotated[Quantity, Role("tokens", "plan", least=ONE)]
"""A number of tokens that is known when the plan is made."""

Count = Annotated[Quantity, Role("count", "plan", least=ONE)]
"""A number of passes, queries, bits or neighbours, known when the plan is made."""

Share = Annotated[Quantity, Role("share", least=ZERO, most=ONE)]
FixedShare = Annotated[Quantity, Role("share", "plan", least=ZERO, most=ONE)]
FixedNumber = Annotated[Quantity, Role("number", "plan")]
