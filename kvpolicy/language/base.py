"""What all of the language's models share: strictness, complaints that know their place, values with spellings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from kvpolicy.language.nodes import shown
from kvpolicy.language.vocabulary import nearest


class Complaint(ValueError):
    """A mistake, placed relative to the value that is being read.

    `path` leads from that value to the culprit, `on` says whether its key or its value is meant, and `offset` and
    `width` point into its text; where only a `word` of the text is known, that is searched for.
    """

    def __init__(
        self,
        reason: str,
        hint: str = "",
        path: tuple[str | int, ...] = (),
        on: str = "value",
        offset: int | None = None,
        width: int = 1,
        word: str = "",
    ) -> None:
        super().__init__(reason)
        self.reason, self.hint, self.path, self.on, self.word = reason, hint, path, on, word
        self.offset, self.width = offset, width


class KnownMistake(ValueError):
    """A consequence of a mistake that is reported elsewhere; nothing to say here."""


class Strict(BaseModel):
    """A mapping with fixed keys; it never changes once read."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=False)

    EXAMPLE: ClassVar[str] = ""
    """How to write one, for messages."""

    NOUN: ClassVar[str] = ""
    """What messages call one, where the key that holds it does not."""


Words = Mapping[str, tuple[str, Mapping[str, str]]]


class Spelled(Strict):
    """A value that is written as a word, or as a mapping with exactly one of the fields."""

    WORDS: ClassVar[Words] = {}
    """Word -> (its meaning, the fields it stands for)."""

    word: str | None = None

    @property
    def kind(self) -> str:
        """The word, or the key that was given."""
        return self.word or next(key for key, name in self.forms().items() if getattr(self, name) is not None)

    @classmethod
    def forms(cls) -> dict[str, str]:
        """Key in YAML -> field, for the spellings that are mappings."""
        return {info.alias or name: name for name, info in cls.model_fields.items() if name != "word"}

    @classmethod
    def spellings(cls) -> list[str]:
        """Every way to write one, as messages show it."""
        return [*(f"`{word}`" for word in cls.WORDS), *(f"`{{{key}: …}}`" for key in cls.forms())]

    @model_validator(mode="before")
    @classmethod
    def _spell(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, cls) or info.context is None:
            return data  # built in Python
        if isinstance(data, str) and data in cls.WORDS:
            return dict(cls.WORDS[data][1])
        ways, noun = f"one of {', '.join(cls.spellings())}", cls.NOUN or f"a value of `{cls.__name__.lower()}`"
        if isinstance(data, str):
            if data in cls.forms():
                raise Complaint(f"`{data}` needs a value", f"write `{{{data}: …}}`")
            near = nearest(data, cls.WORDS)
            raise Complaint(f"`{shown(data)}` is not {noun}", near if near.startswith("did") else ways)
        if not isinstance(data, dict) or not data:
            raise Complaint(f"this is not {noun}", ways)
        first, *others = data
        if first not in cls.forms():
            hint = f"write `{first}` alone" if first in cls.WORDS else nearest(first, cls.forms())
            hint = hint if hint.startswith(("did", "write")) else ways
            raise Complaint(f"`{shown(first)}` is not {noun}", hint, (first,), "key")
        if others:
            reason = f"`{shown(first)}` and `{shown(others[0])}` answer the same question"
            raise Complaint(reason, "keep one of them", (others[0],), "key")
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        properties = handler.resolve_ref_schema(handler(schema)).get("properties", {})
        choices: list[JsonSchemaValue] = [{"const": word, "description": how[0]} for word, how in cls.WORDS.items()]
        for key in cls.forms():
            value = {name: part for name, part in properties[key].items() if name not in ("default", "title")}
            shape = {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}
            choices.append(shape)
        return {"anyOf": choices, "description": (cls.__doc__ or "").strip(), "title": cls.__name__}


@dataclass(frozen=True)
class OneOrMany:
    """Annotates a tuple: a list, or one item without the brackets."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        several = handler(schema)
        return {"anyOf": [several["items"], several]}

    @staticmethod
    def read(value: Any) -> Any:
        return value if isinstance(value, (list, tuple)) else [value]


@dataclass(frozen=True)
class Unless:
    """Annotates a mapping or None: `word` is how None is written."""

    word: str
    example: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"const": self.word}, handler(schema)]}

    def read(self, value: Any) -> Any:
        if value == self.word:
            return None
        if isinstance(value, str):
            reason = f"neither the word `{self.word}` nor a mapping, but `{shown(value)}`"
            raise Complaint(reason, f"write `{self.word}` or a mapping, as in `{self.example}`")
        return value
