"""Which features of the language a search has drawn, counted against all that there are.

What there is to draw is read off the language's own models and words, so that a new key, value, signal or function is
missed here until something draws it.
"""

from __future__ import annotations

import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from kvpolicy.language import Policy, Quantity, loads_policy
from kvpolicy.language.base import Spelled
from kvpolicy.language.policy import PolicyTest
from kvpolicy.language.scorer import Hit, Memory, Queries, Scorer, Smooth
from kvpolicy.language.signals import SIGNALS
from kvpolicy.language.syntax import LEVEL, QuantityError, nodes, parse
from kvpolicy.language.vocabulary import BUILTIN_NAMES, FUNCTIONS, POOL_FUNCTIONS
from kvpolicy.testing.patterns import PATTERNS
from kvpolicy.testing.strategies.texts import drawable

OF_FILES = {"tests"}
"""Top-level keys that say nothing about what a policy does."""


EXTRAS = ("chunk", "turns", "seen_by", "special", "images")
"""Arguments of a text that it need not have."""

EXPRESSIONS = {*LEVEL, "neg", *FUNCTIONS, *POOL_FUNCTIONS, *BUILTIN_NAMES}


def every_feature() -> set[str]:
    """All that a search should draw at least once."""
    found = set(_of_model(Policy, set())) | set(_pairs())
    found |= {f"expression: {word}" for word in EXPRESSIONS}
    found |= {f"text: pattern {name}" for name in PATTERNS if drawable(name)}
    found |= {f"text: {what}" for what in (*EXTRAS, "padded rows", "a row without a prompt")}
    return found | {
        f"text: {n} {what}" for what in ("rows", "layers", "kv_heads", "query heads a KV head") for n in (1, 2)
    }


def features(policy: str, text: Mapping[str, Any]) -> set[str]:
    """What one case draws."""
    document = yaml.safe_load(policy)
    found = {f"Policy.{key}" for key in document}
    loaded = loads_policy(policy)
    for name in Policy.model_fields.keys() & document.keys():
        found |= _drawn(Policy, name, getattr(loaded, name))
    own = {*document.get("params", ()), *document.get("let", ())}
    found |= {f"expression: {word}" for scalar in _scalars(document) for word in _words(scalar, own)}
    return found | set(_of_text(text))


def _words(scalar: str, own: set[str]) -> set[str]:
    """Operations and names of an expression, before its constants are computed; none where it is no expression."""
    try:
        tree = parse(scalar).tree
    except QuantityError:
        return set()
    found = {node[1] if node[0] == "name" else node[0] for node, _ in nodes(tree)} - {"const"} - own
    return found if found <= EXPRESSIONS else set()


def _scalars(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _scalars(item)
    elif isinstance(value, str):
        yield value


# What a policy says, by model and key -------------------------------------------------------------------------------


def _of_model(model: type[BaseModel], known: set[type]) -> Iterator[str]:
    """Every key of a model and of those inside it, and every word that a key may say."""
    known.add(model)
    for name, field in model.model_fields.items():
        if name == "word" or (model is Policy and name in OF_FILES):
            continue
        yield f"{model.__name__}.{field.alias or name}"
        for inner in _inside(field.annotation):
            if isinstance(inner, str):
                yield f"{model.__name__}.{field.alias or name}: {inner}"
            elif inner not in known and inner is not PolicyTest:
                yield from _of_model(inner, known)
    if issubclass(model, Spelled):
        yield from (f"{model.__name__}: {word}" for word, (_, fields) in model.WORDS.items() if "word" in fields)


def _inside(annotation: Any) -> Iterator[Any]:
    """Models and literal words in an annotation."""
    if typing.get_origin(annotation) is Literal:
        yield from (word for word in typing.get_args(annotation) if isinstance(word, str))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in typing.get_args(annotation):
            yield from _inside(part)


def _drawn(model: type[BaseModel], name: str, value: Any) -> set[str]:
    """What the value of a model's key says."""
    field = model.model_fields[name]
    here = f"{model.__name__}.{field.alias or name}"
    found = {here}
    for item in _flat(value):
        if isinstance(item, BaseModel):
            kind = type(item)
            if isinstance(item, Spelled) and item.word is not None:
                found.add(f"{kind.__name__}: {item.word}")
            for inner in item.model_fields_set - {"word"}:
                found |= _drawn(kind, inner, getattr(item, inner))
            if isinstance(item, Scorer) and item.signal is not None:
                found |= set(_pairs_of(item))
        elif isinstance(item, str) and item in _inside(field.annotation):
            found.add(f"{here}: {item}")
    return found


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        for item in value:
            yield from _flat(item)
    elif value is not None and not isinstance(value, Quantity):
        yield value


# Combinations ---------------------------------------------------------------------------------------------------------


def _kinds(model: type[Spelled]) -> list[str]:
    """The ways to write one, as `kind` tells them."""
    words = [word for word, (_, fields) in model.WORDS.items() if "word" in fields]
    return [*words, *(field.alias or name for name, field in model.model_fields.items() if name != "word")]


def _pairs() -> Iterator[str]:
    """Every signal with every stage that it may go through."""
    norms = list(_inside(Scorer.model_fields["norm"].annotation))
    for name, signal in SIGNALS.items():
        stages = {"memory": _kinds(Memory), "hit": _kinds(Hit), "smooth": _kinds(Smooth), "norm": norms}
        stages |= {"queries": _kinds(Queries)} if signal.queries else {}
        yield from (f"{name} with {stage} {kind}" for stage, kinds in stages.items() for kind in kinds)


def _pairs_of(scorer: Scorer) -> Iterator[str]:
    assert scorer.signal is not None
    name = scorer.signal.name
    for stage in ("memory", "hit", "smooth", "queries"):
        value = getattr(scorer, stage)
        if value is not None and (stage != "queries" or SIGNALS[name].queries):
            yield f"{name} with {stage} {value.kind}"
    if scorer.norm is not None:
        yield f"{name} with norm {scorer.norm}"


def _of_text(text: Mapping[str, Any]) -> Iterator[str]:
    prompts = text["prompt"] if isinstance(text["prompt"], list) else [text["prompt"]]
    yield f"text: pattern {text['pattern']}"
    yield f"text: {len(prompts)} rows"
    yield f"text: {text['layers']} layers"
    yield f"text: {text['kv_heads']} kv_heads"
    yield f"text: {text['heads'] // text['kv_heads']} query heads a KV head"
    yield from (f"text: {key}" for key in EXTRAS if key in text)
    if len(set(prompts)) > 1:
        yield "text: padded rows"
    if 0 in prompts:
        yield "text: a row without a prompt"


def table(drawn: Counter[str], columns: int = 3) -> str:
    """How often each feature was drawn, those never drawn first."""
    names = sorted(every_feature() | drawn.keys(), key=lambda name: (drawn[name] > 0, name))
    width = max(map(len, names)) + 2
    cells = [f"{drawn[name]:>7}  {name:<{width}}" for name in names]
    rows = -(-len(cells) // columns)
    return "\n".join("".join(cells[row::rows]).rstrip() for row in range(rows))
