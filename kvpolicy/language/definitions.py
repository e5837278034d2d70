"""Params and `let` names: read first, because every other quantity may name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from kvpolicy.language.base import Complaint, KnownMistake
from kvpolicy.language.nodes import Node, shown
from kvpolicy.language.quantity import Quantity
from kvpolicy.language.scope import Scope, listed
from kvpolicy.language.syntax import QuantityError, parse
from kvpolicy.language.vocabulary import RESERVED

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
MAX_NAMES = 200

Path = tuple[str | int, ...]
Placed = tuple[Path, Complaint]


def section(root: Node, key: str) -> dict[str, Node]:
    """A top-level mapping's nodes; empty where there is none."""
    node = root.content.get(key)
    return node.content if node is not None and isinstance(node.content, dict) else {}


@dataclass
class Definitions:
    """The names that a policy defines, in the order of its text, with their values where they have any."""

    root: Node
    scope: Scope = field(default_factory=Scope)
    complaints: list[Placed] = field(default_factory=list)
    places: dict[str, Path] = field(default_factory=dict)
    refers: dict[str, set[str]] = field(default_factory=dict)
    """Which other definitions each one names."""

    @classmethod
    def read(cls, root: Node) -> Definitions:
        """Parse, check and resolve all params and `let` names of a document."""
        self = cls(root)
        texts = dict(self.texts())
        values: dict[str, Quantity] = {}
        broken = set(self.places) - set(texts)
        named = frozenset(section(root, "pools"))
        pools = named | frozenset(overridden_pools(root)) if named else None
        known = Scope({name: Quantity.number(0) for name in self.places}, pools=pools)
        for name, text in texts.items():
            try:
                parsed = parse(text)
                known.check_names(parsed.names)
                self.refers[name] = {mention.word for mention in parsed.names} & set(self.places)
            except QuantityError as error:
                broken |= self.complain(
                    name, Complaint(error.reason, error.hint, (), "value", error.offset, error.width)
                )
            except Complaint as complaint:
                broken |= self.complain(name, complaint)
        for name in self.in_order(broken):
            scope = Scope(values, frozenset(broken), pools)
            try:
                values[name] = scope.resolve(texts[name])[0]
            except Complaint as complaint:
                broken |= self.complain(name, complaint)
            except KnownMistake:
                broken.add(name)
        self.scope = Scope(values, frozenset(broken), pools)
        self.check_defaults()
        return self

    def check_defaults(self) -> None:
        """A default must be readable even where another value is set."""
        for name, node in section(self.root, "params").items():
            if isinstance(node.content, dict) and {"default", "value"} <= node.content.keys():
                default = node.content["default"]
                try:
                    if not isinstance(default.content, str):
                        raise Complaint(f"`{name}` is a number or an expression, but this is {default.kind}")
                    self.scope.resolve(default.content)
                except Complaint as complaint:
                    self.complaints.append((("params", name, "default"), complaint))
                except KnownMistake:
                    pass

    def complain(self, name: str, complaint: Complaint) -> set[str]:
        self.complaints.append((self.places[name], complaint))
        return {name}

    def texts(self) -> Iterator[tuple[str, str]]:
        """Name -> expression, for every definition that has one; what is misnamed is complained about."""
        for kind in ("params", "let"):
            for name, node in section(self.root, kind).items():
                reason, hint = self.misnamed(name, kind)
                if reason:
                    self.complaints.append(((kind, name), Complaint(reason, hint, (), "key")))
                if name in self.places:
                    continue
                self.places[name] = (kind, name)
                value: Node | None = node
                if kind == "params" and isinstance(node.content, dict):
                    key = "value" if "value" in node.content else "default"
                    value, self.places[name] = node.content.get(key), (kind, name, key)
                elif kind == "params":
                    continue  # the models say what a param is
                if value is not None and isinstance(value.content, str):
                    yield name, value.content
                elif value is not None:
                    self.complain(
                        name, Complaint(f"`{shown(name)}` is a number or an expression, but this is {value.kind}")
                    )

    def misnamed(self, name: str, kind: str) -> tuple[str, str]:
        if len(self.places) >= MAX_NAMES:
            return f"more than {MAX_NAMES} params and `let` names", "split the policy"
        if not IDENTIFIER.fullmatch(name):
            return f"`{shown(name)}` cannot be a name in expressions", "use letters, digits and `_`, a letter first"
        if name in RESERVED:
            return f"`{name}` would hide a built-in name", "choose another name"
        if name in self.places:
            return f"`{name}` is a param already", "choose another name"
        return "", ""

    def in_order(self, broken: set[str]) -> list[str]:
        """Definitions, each after those it names; what names itself is complained about and left out."""
        while True:
            whole = {name: refers for name, refers in self.refers.items() if name not in broken}
            try:
                order = TopologicalSorter(
                    {n: sorted(refers & whole.keys()) for n, refers in whole.items()}
                ).static_order()
                return list(order)
            except CycleError as error:
                cycle = set(error.args[1])
                first = min(cycle, key=list(self.places).index)
                way = " → ".join(f"`{name}`" for name in walk_cycle(first, whole, cycle))
                self.complain(first, Complaint(f"`{first}` is defined by itself: {way}", "break the circle"))
                broken |= cycle

    def data(self) -> dict[str, Any]:
        """The document as data for the models, with these names' quantities put in."""
        data: dict[str, Any] = self.root.data()
        for name, param in section(self.root, "params").items():
            if isinstance(param.content, dict):
                given = data["params"][name]
                given["value"] = self.scope.values.get(name)
                if "default" in given:
                    given["default"] = as_written(given["default"])
        for name in section(self.root, "let"):
            data["let"][name] = self.scope.values.get(name)
        return data

    def unused(self, used: set[str]) -> Iterator[Placed]:
        """Params that change nothing, given the names that the rest of the policy uses."""
        reached, stack = set(), [name for name in used if name in self.refers]
        while stack:
            name = stack.pop()
            if name not in reached:
                reached.add(name)
                stack += self.refers[name]
        for name in section(self.root, "params"):
            if name not in reached:
                hint = f"use it in a pool, or remove it; used: {listed(sorted(reached)) or 'none'}"
                yield (
                    ("params", name),
                    Complaint(f"the param `{name}` changes nothing: no pool uses it", hint, (), "key"),
                )


def as_written(text: object) -> Quantity | None:
    """A default's own expression, unresolved; None where it has a mistake."""
    try:
        return Quantity.parse(text) if isinstance(text, str) else None
    except QuantityError:
        return None


def overridden_pools(root: Node) -> Iterator[str]:
    """Names of pools that overrides add."""
    overrides = root.content.get("overrides")
    for node in overrides.content if overrides is not None and isinstance(overrides.content, tuple) else ():
        if isinstance(node.content, dict):
            yield from section(node, "pools")


def walk_cycle(first: str, refers: Mapping[str, set[str]], cycle: set[str]) -> list[str]:
    """The names from `first` around a circle and back."""
    way = [first]
    while True:
        following = min(refers[way[-1]] & cycle)
        if following in way:
            return [*way[way.index(following) :], following]
        way.append(following)
