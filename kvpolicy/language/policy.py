"""A policy as the rest of kvpolicy sees it: checked, with params and `let` names put in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    WithJsonSchema,
    field_validator,
)

from kvpolicy.errors import Diagnostic, UsageError
from kvpolicy.language.base import Complaint, KnownMistake, Strict
from kvpolicy.language.nodes import shown, typed
from kvpolicy.language.override import LayerRange, Override, overridden
from kvpolicy.language.pool import Admit, Evict, Pin, Pool, Read, Store, Update
from kvpolicy.language.quantity import Quantity
from kvpolicy.language.scope import Fixed
from kvpolicy.language.scorer import Hit, Memory, Queries, Scorer, Signal, Smooth

__all__ = [
    "Admit",
    "Evict",
    "Hit",
    "LayerRange",
    "Memory",
    "Override",
    "Param",
    "Pin",
    "Policy",
    "PolicyTest",
    "Pool",
    "Queries",
    "Read",
    "Scorer",
    "Signal",
    "Smooth",
    "Store",
    "Update",
]

VERSION = 1
"""The language version that this build reads."""


def defined(value: Any) -> Quantity:
    """A param's or a `let` name's quantity, which was read before the models (see definitions.py)."""
    if isinstance(value, Quantity):
        return value
    raise KnownMistake


Defined = Annotated[Quantity, BeforeValidator(defined), WithJsonSchema({"type": ["number", "string"]})]


def one_line(value: str) -> str:
    if not value.strip() or "\n" in value.strip():
        raise Complaint("one line of text expected")
    return value.strip()


Line = Annotated[str, BeforeValidator(lambda value: one_line(value) if isinstance(value, str) else value)]


class Param(Strict):
    """A number that a user may set."""

    EXAMPLE = '{default: 1024, help: "tokens kept"}'
    NOUN = "a param"

    default: Defined
    """the value when nobody sets one: an expression, which may name other params"""

    help: Line
    """what it means, in one line"""

    given: Defined | None = Field(None, alias="value")
    """what it was set to; written where a policy is saved"""

    @property
    def value(self) -> Quantity:
        """What it stands for: what it was set to or the default, with other names put in."""
        return self.given or self.default


class PolicyTest(Strict):
    """A claim about the policy under synthetic or recorded attention, run by `kvpolicy test`."""

    EXAMPLE = "{name: …, attention: {pattern: sink, steps: 64}, expect: [{resident: {max: 64}}]}"
    NOUN = "a test"

    name: Line
    """what is claimed"""

    set: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies defaults)
    """values of params"""

    attention: dict[str, Any]
    """a pattern with its arguments, or a recorded trace"""

    expect: tuple[dict[str, Any], ...]
    """what must hold, one or two keys each"""

    @field_validator("set", "attention", "expect", mode="after")
    @classmethod
    def _typed(cls, value: Any) -> Any:
        return tuple(typed(item) for item in value) if isinstance(value, tuple) else typed(value)

    @field_validator("attention", mode="after")
    @classmethod
    def _source(cls, value: dict[str, Any]) -> dict[str, Any]:
        if ("pattern" in value) == ("trace" in value):
            raise Complaint("a test has a `pattern` or a `trace` of attention", "as in `{pattern: sink, steps: 64}`")
        return value

    @field_validator("expect", mode="after")
    @classmethod
    def _claims(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        if not value:
            raise Complaint("a test expects something", "as in `[{resident: {max: 64}}]`")
        for index, claim in enumerate(value):
            if not 1 <= len(claim) <= 2:
                raise Complaint(
                    f"a claim has one or two keys, this one {len(claim)}", "as in `{keeps: 40, until: 90}`", (index,)
                )
        return value


class Origin(Protocol):
    """Where a policy came from: what `bind`, `to_yaml` and `diagnostic` need of its text."""

    def bind(self, params: dict[str, object]) -> Policy: ...

    def to_yaml(self) -> str: ...

    def diagnostic(self, path: tuple[str | int, ...], complaint: Complaint) -> Diagnostic: ...


class Policy(Strict):
    """What a policy's file says.

    Once loaded, only built-in names are free in its quantities: params and `let` are put in.
    """

    NOUN = "a policy"

    kvpolicy: Literal[1]
    """the language's version, 1"""

    name: str
    """what the policy is called: letters, digits, `-`, `_` and `.`"""

    summary: str = ""
    """what it does, in a sentence or two"""

    cite: tuple[str, ...] = ()
    """where it was published, as in `arXiv:2502.11147`"""

    extends: str | None = None
    """one parent, by name or path, whose params, `let` and pools are merged by key; `null` deletes"""

    params: dict[str, Param] = {}  # noqa: RUF012 (pydantic copies defaults)
    """the only names a user may set"""

    let: dict[str, Defined] = {}  # noqa: RUF012 (pydantic copies defaults)
    """names for expressions that are used below"""

    pools: dict[str, Pool]
    """the pools, read top-down by tokens that enter"""

    total: Fixed | None = None
    """the most tokens that all pools together may keep; a prompt with which they could not is refused"""

    positions: Literal["absolute", "compact"] = "absolute"
    """whether keys keep the rotation of their own position, or are rotated to their rank among residents"""

    prompt_chunk: Fixed | None = None
    """the prompt is fed in chunks of this many tokens, with an update after each"""

    overrides: tuple[Override, ...] = ()
    """other answers for some layers or heads"""

    tests: tuple[PolicyTest, ...] = ()
    """claims about the policy, run by `kvpolicy test`"""

    _source: str = PrivateAttr("<string>")
    _origin: Origin | None = PrivateAttr(None)

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise Complaint(f"`{shown(name)}` is no name", "letters, digits, `-`, `_` and `.`, as in `scope-slide`")
        return name

    @property
    def source(self) -> str:
        """The file it was read from, or "<string>"."""
        return self._source

    @cached_property
    def digest(self) -> str:
        """12 hex digits that are equal for policies that do the same, whatever they are called and cite."""
        told = json.dumps(self._meaning(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def pools_for(self, layer: int, layers: int, head: int | None = None) -> dict[str, Pool] | None:
        """The pools of one layer of a model with `layers` governed layers, for one KV head or for those not named.

        None means dense: nothing is ever evicted. Raises PolicyError where an override names no layer of the model.
        """
        pools: dict[str, Pool] | None = dict(self.pools)
        for override in self.overrides:
            override.check(layers)
            if override.applies(layer, layers, head):
                pools = (
                    None
                    if override.pools is None
                    else overridden(self.pools if pools is None else pools, override.pools)
                )
        return pools

    def reads(self, name: str) -> bool:
        """Whether a number of the policy depends on this built-in name, as in `max_new_tokens`."""
        said = (self.pools, self.overrides, self.total, self.prompt_chunk)
        return any(name in quantity.names for quantity in _quantities(said))

    def bind(self, **params: object) -> Policy:
        """The same policy with other values of params. Raises PolicyError as loading does."""
        return self._text().bind(params)

    def to_yaml(self) -> str:
        """The policy as one YAML text, parent merged in, that loads to an equal policy."""
        return self._text().to_yaml()

    def diagnostic(self, path: tuple[str | int, ...], complaint: Complaint) -> Diagnostic:
        """A complaint about what lies at `path`, keys and indices from the top, as a message that shows the place."""
        return self._text().diagnostic(path, complaint)

    def _text(self) -> Origin:
        if self._origin is None:
            raise UsageError(f"policy {self.name!r} was built without a text; load it with load_policy or loads_policy")
        return self._origin

    def _meaning(self) -> dict[str, Any]:
        """What the policy does, as plain data."""
        fields = {"kvpolicy", "pools", "total", "positions", "prompt_chunk"}
        told = self.model_dump(mode="json", by_alias=True, include=fields)
        told["pools"] = list(told["pools"].items())  # pools are read top-down, so their order means something
        told["overrides"] = [o.model_dump(mode="json", by_alias=True, exclude_unset=True) for o in self.overrides]
        return told

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Policy):
            return NotImplemented
        words = {"name", "summary", "cite", "params", "let", "tests"}
        return self._meaning() == other._meaning() and all(getattr(self, w) == getattr(other, w) for w in words)

    def __hash__(self) -> int:
        return hash((self.name, self.digest))


def _quantities(value: object) -> Iterator[Quantity]:
    """Every quantity inside a value, however deep."""
    if isinstance(value, Quantity):
        yield value
    elif isinstance(value, BaseModel):
        yield from _quantities(list(vars(value).values()))
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _quantities(each)
