"""The JSON Schema and the reference page say what the models say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvpolicy.language import shipped_policies
from kvpolicy.language.base import Spelled, Strict
from kvpolicy.language.policy import LayerRange, Policy
from kvpolicy.language.reference import SECTIONS, render_reference, title_of
from kvpolicy.language.report import bare
from kvpolicy.language.schema import DIALECT, json_schema
from kvpolicy.language.signals import SIGNALS
from kvpolicy.language.vocabulary import BUILTIN_NAMES, FUNCTIONS

SCHEMA = json_schema()
VALID = [*(Path(__file__).parent / "valid").glob("*.yaml"), *shipped_policies().values()]


def reached(model: type[Strict], found: set[type[Strict]]) -> set[type[Strict]]:
    """Every model that a model's fields lead to."""
    found.add(model)
    for field in model.model_fields.values():
        for part in parts(field.annotation):
            if isinstance(part, type) and issubclass(part, Strict) and part not in found:
                reached(part, found)
    return found


def parts(annotation: Any) -> list[Any]:
    annotation = bare(annotation)
    inner = [part for argument in getattr(annotation, "__args__", ()) for part in parts(argument)]
    return [annotation, *inner]


MODELS = reached(Policy, set())


def test_the_reference_page_has_every_model():
    assert {model for _, models in SECTIONS for model in models} == MODELS - {LayerRange}


def test_the_reference_page_has_every_key_and_word():
    page = render_reference()
    for model in MODELS - {LayerRange}:
        assert f"### {title_of(model)}\n" in page
        for name, field in model.model_fields.items():
            if name != "word" and title_of(model) != "signal":
                key = field.alias or name
                assert f"`{key}`" in page or f"`{{{key}: …}}`" in page, (model, key)
                assert field.description, f"{model.__name__}.{name} has no docstring"
        if issubclass(model, Spelled):
            assert all(f"| `{word}` |" in page for word in model.WORDS)
    for name in (*SIGNALS, *BUILTIN_NAMES):
        assert f"`{name}`" in page
    assert all(f"`{name}(" in page for name in FUNCTIONS)
    assert not re.search(r"Quantity|Annotated|typing|None", page)


def test_links_on_the_reference_page_lead_somewhere():
    page = render_reference()
    titles = set(re.findall(r"^### (.+)$", page, re.M))
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= titles


def test_the_schema_is_closed_and_plain():
    assert SCHEMA["$schema"] == DIALECT
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert SCHEMA["additionalProperties"] is False
    for name, definition in SCHEMA["$defs"].items():
        if "properties" in definition:
            assert definition["additionalProperties"] is False, name
    text = json.dumps(SCHEMA)
    assert '"word"' not in text and "tree" not in text and '"given"' not in text


def accepts(schema: Any, value: Any) -> bool:
    """As much of JSON Schema as this schema uses."""
    if "$ref" in schema:
        return accepts(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], value)
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    kinds["null"] = type(None)
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    good = not wanted or any(isinstance(value, kinds[kind]) for kind in wanted)
    good &= "const" not in schema or value == schema["const"]
    good &= "enum" not in schema or value in schema["enum"]
    good &= "anyOf" not in schema or any(accepts(one, value) for one in schema["anyOf"])
    good &= "not" not in schema or not accepts(schema["not"], value)
    if isinstance(value, str):
        good &= "pattern" not in schema or bool(re.search(schema["pattern"], value))
    if isinstance(value, list):
        good &= all(accepts(schema.get("items", {}), item) for item in value)
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", {})
        good &= all(key in value for key in schema.get("required", []))
        good &= len(value) <= schema.get("maxProperties", 99)
        for key, item in value.items():
            rule = known.get(key, more)
            good &= rule is not False and (rule is True or accepts(rule, item))
            good &= "propertyNames" not in schema or accepts(schema["propertyNames"], key)
    return bool(good)


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_the_schema_accepts_what_loads(path):
    assert accepts(SCHEMA, yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("budget: max", "budgett: max"),
        ("memory: last-hit", "memory: last_hit"),
        ("hit: {top: touch}", "hit: {bottom: touch}"),
        ("kvpolicy: 1", "kvpolicy: 2"),
        ("admit: prompt", "admit: {modality: smell}"),
        ("signal: page-bound", "signal: {random: {sed: 3}}"),
        ("pools:", "polls:"),
        ("heads: max", "heads: {logits: mean}"),
    ],
)
def test_the_schema_refuses_misspellings(old, new):
    text = (Path(__file__).parent / "valid" / "raas.yaml").read_text()
    assert old in text and not accepts(SCHEMA, yaml.safe_load(text.replace(old, new)))
