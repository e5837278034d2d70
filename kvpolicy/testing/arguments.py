"""Arguments of patterns and claims: plain YAML data, read as a function's own annotations say."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kvpolicy.language.base import Complaint
from kvpolicy.language.nodes import shown
from kvpolicy.language.vocabulary import nearest
from kvpolicy.testing.tokens import numbers, read_tokens, whole
from kvpolicy.testing.turns import read_turns

IMPLIED = ("scene", "against")
"""Parameters of a pattern that nobody writes."""

Reader = Callable[[Any], Any]

Tokens = tuple[int, ...]
"""Positions."""

Share = float
"""A number from 0 to 1."""

Numbers = tuple[int, ...]
"""One whole number or a list of them."""

Places = tuple[int, ...]
"""`3`, `0..3`, or a list of these: positions anywhere, or numbers of layers, heads or rows."""


def real(value: Any) -> float:
    """A number. Raises Complaint."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise Complaint(f"`{shown(value)}` is not a number")
    return float(value)


def share(value: Any) -> float:
    """A number from 0 to 1, which may be written as `90%`. Raises Complaint."""
    hint = "a share is a number from 0 to 1, as in `0.9` or `90%`"
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            value = float(value.strip().removesuffix("%")) / 100
        except ValueError:
            raise Complaint(f"`{shown(value)}` is not a share", hint) from None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise Complaint(f"`{shown(value)}` is not a share", hint)
    return float(value)


def places(value: Any) -> Places:
    """Raises Complaint."""
    return read_tokens(value, 10**6)


READERS: Mapping[str, Reader] = {
    "int": whole,
    "float": real,
    "Numbers": numbers,
    "Places": places,
    "Share": share,
    "Turns": read_turns,
}
"""By annotation."""


@contextmanager
def within(*path: str | int) -> Iterator[None]:
    """Complaints raised inside are about what lies at ``path``."""
    try:
        yield
    except Complaint as complaint:
        complaint.path = (*path, *complaint.path)
        raise


def known(function: Callable[..., Any]) -> list[str]:
    """The arguments that a function takes from YAML, as they are written there."""
    return [name.removesuffix("_") for name in _parameters(function)]


def read_arguments(
    function: Callable[..., Any], given: Mapping[str, Any], readers: Mapping[str, Reader], beside: Collection[str] = ()
) -> dict[str, Any]:
    """Keyword arguments of ``function``; ``readers`` go by annotation, and names by Python's own but for a final `_`.

    Raises:
        Complaint: one that is unknown (``beside`` are names that others take), missing, or of another kind.
    """
    parameters, read = _parameters(function), {}
    names = {name.removesuffix("_"): name for name in parameters}
    for key, value in given.items():
        if key not in names:
            raise Complaint(f"`{shown(key)}` is not an argument here", nearest(key, [*names, *beside]), (key,), "key")
        with within(key):
            read[names[key]] = readers[parameters[names[key]].annotation.removesuffix(" | None")](value)
    for key, name in names.items():
        if name not in read and parameters[name].default is inspect.Parameter.empty:
            raise Complaint(f"the argument `{key}` is missing", f"known here: {', '.join(f'`{n}`' for n in names)}")
    return read


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {name: at for name, at in inspect.signature(function).parameters.items() if name not in IMPLIED}
