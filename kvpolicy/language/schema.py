"""The language as a JSON Schema (2020-12), for editors: generated from the models, never kept by hand."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from kvpolicy.language.base import Spelled
from kvpolicy.language.inherit import NOT_INHERITED
from kvpolicy.language.policy import VERSION, Policy
from kvpolicy.language.quantity import Quantity

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema of a policy's YAML, with descriptions from the models' docstrings."""
    schema = Policy.model_json_schema(by_alias=True, schema_generator=Generator)
    properties, pool = schema["properties"], schema["$defs"]["Pool"]
    overridden = schema["$defs"]["Override"]["properties"]["pools"]
    for holder in (properties["params"], properties["let"], properties["pools"], overridden):
        holder["additionalProperties"] = nullable(holder["additionalProperties"])
    inherited = properties.keys() - {"kvpolicy", *NOT_INHERITED}
    schema["properties"] = {key: nullable(value) if key in inherited else value for key, value in properties.items()}
    pool["properties"] = {key: nullable(value) for key, value in pool["properties"].items()}
    schema["required"] = ["kvpolicy", "name"]
    schema["anyOf"] = [{"required": ["pools"]}, {"required": ["extends"]}]
    schema["title"] = f"kvpolicy, language version {VERSION}"
    return {"$schema": DIALECT} | schema


def nullable(schema: JsonSchemaValue) -> JsonSchemaValue:
    """The schema, or null, which deletes what a parent or the policy's own pools say."""
    words: JsonSchemaValue = {key: schema[key] for key in schema.keys() & {"description", "default"}}
    inner = {key: value for key, value in schema.items() if key not in words}
    return {"anyOf": [inner, {"type": "null"}], **words}


def as_written(value: object) -> Any:
    """A default as a user would write it; None where it cannot be written."""
    if isinstance(value, Quantity):
        whole = value.constant is not None and value.constant.denominator == 1 and not value.share
        return int(value.canonical) if whole else value.canonical
    if isinstance(value, Spelled):
        words = (word for word, (_, fields) in value.WORDS.items() if type(value).model_validate(dict(fields)) == value)
        return next(words, None) or {value.kind: as_written(getattr(value, value.forms()[value.kind]))}
    if isinstance(value, (BaseModel, dict, tuple)):
        return None
    return value


class Generator(GenerateJsonSchema):
    """Pydantic's schema, in the spelling of YAML: no titles, no nulls but those that delete, defaults as written."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        generated = super().default_schema(schema)
        if generated.get("default") is None:
            generated.pop("default", None)
        return generated

    def encode_default(self, dft: Any) -> Any:
        return as_written(dft)
