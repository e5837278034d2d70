"""Text -> Policy: read, merge, resolve, check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from kvpolicy.errors import Diagnostic, PolicyError
from kvpolicy.language.base import Complaint
from kvpolicy.language.checks import check
from kvpolicy.language.definitions import Definitions
from kvpolicy.language.inherit import FLAG, complete, flag_span, with_values
from kvpolicy.language.library import fetch
from kvpolicy.language.nodes import Node
from kvpolicy.language.policy import VERSION, Policy
from kvpolicy.language.reader import read
from kvpolicy.language.report import from_models, gather, place, refuse


def load_policy(source: str | Path, set: Mapping[str, object] | None = None) -> Policy:
    """Load a policy.

    Args:
        source: a path (it has a slash or ends in .yaml), the name of a shipped policy, or "-" for standard input.
        set: values of params, by name; texts are read as expressions.

    Raises:
        PolicyError: with a diagnostic for every mistake found.
    """
    text, name = fetch(source)
    return loads_policy(text, name, set)


def loads_policy(text: str, filename: str = "<string>", set: Mapping[str, object] | None = None) -> Policy:
    """Load a policy from its YAML text; `filename` is its name in messages, and where `extends` looks from.

    Raises:
        PolicyError: with a diagnostic for every mistake found.
    """
    return resolve_with(complete(read(text, filename)), set or {})


def resolve_with(root: Node, values: Mapping[str, object]) -> Policy:
    """The policy of a complete document, with params set to other values.

    Mistakes that the document alone does not have are shown at the flag without which they vanish.
    """
    try:
        return resolve(with_values(root, values))
    except PolicyError as error:
        if values and not mistakes_of(root, {}):
            blamed = [blame(item, root, values) for item in error.diagnostics]
            error = PolicyError(diagnostics={(item.place, item.reason): item for item in blamed}.values())
        raise error from None


def blame(mistake: Diagnostic, root: Node, values: Mapping[str, object]) -> Diagnostic:
    """A mistake, moved to the flag that causes it."""
    if mistake.file == FLAG:
        return mistake
    for name in values:
        fewer = {other: value for other, value in values.items() if other != name}
        if mistake not in mistakes_of(root, fewer):
            hint = "; ".join(filter(None, (mistake.hint, f"it follows in {mistake.place}")))
            return flag_span(name, values[name]).diagnostic(mistake.reason, hint)
    return mistake


def mistakes_of(root: Node, values: Mapping[str, object]) -> tuple[Diagnostic, ...]:
    try:
        resolve(with_values(root, values))
    except PolicyError as error:
        return error.diagnostics
    return ()


def resolve(root: Node) -> Policy:
    """The policy of a complete document."""
    definitions = Definitions.read(root)
    data = definitions.data()
    data["kvpolicy"] = VERSION
    mistakes = gather(root, definitions.complaints)
    policy = None
    try:
        policy = Policy.model_validate(data, context=definitions.scope)
    except ValidationError as failure:
        mistakes += from_models(root, failure)
    refuse(mistakes, root)
    assert policy is not None  # every error has a diagnostic of its own, or follows from one that has
    refuse(gather(root, [*definitions.unused(definitions.scope.used), *check(policy)]), root)
    policy._source = root.span.source.name
    policy._origin = Text(root)
    return policy


@dataclass(frozen=True)
class Text:
    """A policy's complete document, from which it can be read again with other values."""

    root: Node

    def bind(self, params: Mapping[str, object]) -> Policy:
        return resolve_with(self.root, params)

    def diagnostic(self, path: tuple[str | int, ...], complaint: Complaint) -> Diagnostic:
        return place(self.root, path, complaint)

    def to_yaml(self) -> str:
        root = Node({key: node for key, node in self.root.content.items() if key != "extends"}, self.root.span)
        body = [yaml.StreamStartEvent(), yaml.DocumentStartEvent(explicit=False), *events(root)]
        text = yaml.emit(
            [*body, yaml.DocumentEndEvent(explicit=False), yaml.StreamEndEvent()], width=10**6, allow_unicode=True
        )
        return str(text)


def events(node: Node) -> Iterator[yaml.Event]:
    """A node as YAML events; mappings and lists of scalars are written in one line."""
    content = node.content
    if isinstance(content, (dict, tuple)):
        parts = list(content.values() if isinstance(content, dict) else content)
        flow = not any(isinstance(part.content, (dict, tuple)) for part in parts)
        if isinstance(content, dict):
            yield yaml.MappingStartEvent(None, None, True, flow_style=flow)
            for key, part in content.items():
                yield yaml.ScalarEvent(None, None, (True, True), key)
                yield from events(part)
            yield yaml.MappingEndEvent()
        else:
            yield yaml.SequenceStartEvent(None, None, True, flow_style=flow)
            for part in parts:
                yield from events(part)
            yield yaml.SequenceEndEvent()
        return
    text = {None: "null", True: "true", False: "false"}.get(content, content)
    yield yaml.ScalarEvent(None, None, (True, True), text, style=None if node.plain else '"')
