"""Where a policy's numbers stand, what each of them counts, and within which limits: as the models themselves say."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from kvpolicy.language.policy import Policy
from kvpolicy.language.quantity import Quantity
from kvpolicy.language.scope import Role
from kvpolicy.language.scorer import Signal
from kvpolicy.language.signals import definition

Path = tuple[str | int, ...]
Number = tuple[Path, Role, Quantity]
"""A number's place, what it counts, and its value with params put in."""

PARTS = ("pools", "overrides", "total", "prompt_chunk")
"""Of a policy, what says how it works."""


def numbers(policy: Policy) -> Iterator[Number]:
    """Every number that says how a policy works, with its place from the top."""
    for part in PARTS:
        yield from _within((part,), getattr(policy, part), role_of(Policy, part))


def _within(where: Path, value: object, role: Role | None) -> Iterator[Number]:
    if isinstance(value, Quantity):
        if role is not None:
            yield where, role, value
    elif isinstance(value, Signal):
        for name, argument in definition(value.name).arguments.items():
            least = Role("number", "plan", argument.least)
            yield from _within((*where, value.name, name), value.args.get(name), least)
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from _within((*where, field), getattr(value, field), role_of(type(value), field))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _within((*where, key), item, role)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _within((*where, index), item, role)


@cache
def role_of(model: type[BaseModel], field: str) -> Role | None:
    """What a field's number counts; None where it holds none."""
    info = model.model_fields[field]
    found = next((item for item in info.metadata if isinstance(item, Role)), None)
    return found or _role_in(info.annotation)


def _role_in(annotation: Any) -> Role | None:
    for part in get_args(annotation):
        found = part if isinstance(part, Role) else _role_in(part)
        if found is not None:
            return found
    return None
