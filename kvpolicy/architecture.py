"""Which model families kvpolicy can patch, and which of their layers a policy may touch. Imports no torch.

A family is one file in `patches/` that states facts in an `Architecture` and copies no forward. Third parties register
theirs under the entry-point group `kvpolicy.architectures`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from kvpolicy.errors import ModelError

GROUP = "kvpolicy.architectures"


@dataclass(frozen=True)
class Architecture:
    """The facts about one family of decoders.

    model_types: transformers' names for it, as in `config.model_type`.
    covers: published models that are of it, for the reader.
    decoder: where the base model keeps its text decoder; "" where it is one itself.
    layers: where that decoder keeps its list of layers.
    attention: where a decoder layer keeps its attention module.
    rotary: where the decoder keeps its rotary embedding.
    sinks: whether its softmax has a logit that belongs to no token, for each query head.
    temperature: (attention module, positions [B, N] of its queries, -1 for padding) -> what they must still be
        multiplied by [B, N], or None; for models whose own code reads positions off the cache.
    image_token: what the base model's config calls the id that stands for an image's token; "" where it sees no images.
    refused: why no policy can be applied to it; "" where one can.
    """

    model_types: tuple[str, ...]
    covers: str
    decoder: str = ""
    layers: str = "layers"
    attention: str = "self_attn"
    rotary: str = "rotary_emb"
    sinks: bool = False
    temperature: Callable[[Any, Any], Any] | None = None
    image_token: str = ""
    refused: str = ""


@cache
def architectures() -> dict[str, Architecture]:
    """Every architecture that can be patched by `model_type`, shipped ones first.

    Raises:
        ModelError: two files claim one model type, or a file or plug-in cannot be read; both owners are named.
    """
    found: dict[str, Architecture] = {}
    owners: dict[str, str] = {}
    for owner, architecture in (*_shipped(), *_plugged_in()):
        if not isinstance(architecture, Architecture):
            raise ModelError(f"{owner} must be a kvpolicy.architecture.Architecture, not {type(architecture).__name__}")
        for model_type in architecture.model_types:
            if model_type in found:
                raise ModelError(f"two architectures claim model type '{model_type}': {owners[model_type]} and {owner}")
            found[model_type], owners[model_type] = architecture, owner
    return {model_type: architecture for model_type, architecture in found.items() if not architecture.refused}


@cache
def families() -> dict[str, Architecture]:
    """The architectures by family: those that ship by the name of their file in `patches/`, others by their type."""
    shipped = {owner.split(".")[-2]: architecture for owner, architecture in _shipped()}
    types = {each for architecture in shipped.values() for each in architecture.model_types}
    others = {name: architecture for name, architecture in architectures().items() if name not in types}
    return {**shipped, **others}


def refuse(model_type: str) -> None:
    """Refuse models of a type that is known to have no place for a policy.

    Raises:
        ModelError: it is, and why.
    """
    for architecture in families().values():
        if architecture.refused and model_type in architecture.model_types:
            raise ModelError(f"no policy can be applied to models of type '{model_type}': {architecture.refused}")


def architecture_of(model_type: str) -> Architecture:
    """The architecture of a `config.model_type`.

    Raises:
        ModelError: no file in `patches/` and no plug-in states it, and the supported ones are named; or it has no place
            for a policy.
    """
    known = architectures()
    if model_type in known:
        return known[model_type]
    refuse(model_type)
    raise ModelError(
        f"kvpolicy does not know models of type '{model_type}'; it knows {', '.join(sorted(known))}. To try this one "
        "all the same, untested: --generic, or kvpolicy.apply(…, generic=True). A new family is one file in patches/, "
        f"or an entry point of group {GROUP}"
    )


def _shipped() -> Iterator[tuple[str, Any]]:
    patches = import_module("kvpolicy.patches")
    for entry in sorted(pkgutil.iter_modules(patches.__path__), key=lambda entry: entry.name):
        owner = f"kvpolicy.patches.{entry.name}"
        yield f"{owner}.ARCHITECTURE", getattr(import_module(owner), "ARCHITECTURE", None)


def _plugged_in() -> Iterator[tuple[str, Any]]:
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        owner = f"entry point {entry.name} = {entry.value}"
        try:
            yield owner, entry.load()
        except Exception as error:
            raise ModelError(f"{owner} of group {GROUP} cannot be loaded: {error}; fix or uninstall it") from error
