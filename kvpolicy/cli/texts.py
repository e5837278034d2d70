"""Where the text of a simulation comes from: a pattern, a policy's own test, or a recorded trace."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvpolicy.cli.words import plural
from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.language import Policy
from kvpolicy.language.base import Complaint
from kvpolicy.language.nodes import shown, typed
from kvpolicy.language.reader import read
from kvpolicy.language.vocabulary import nearest

if TYPE_CHECKING:
    from kvpolicy.testing.patterns import Attention

SPELLING = "as in --pattern milestone,at=40,until=90"


@dataclass(frozen=True)
class Source:
    """What is to be said: ``arguments`` as a test's `attention` has them, and ``params`` that the test sets.

    ``title`` is for readers, ``flag`` for messages; ``test`` the number of the first policy's test, if it is one;
    ``near`` the file whose folder a trace's path starts from.
    """

    title: str
    flag: str
    arguments: Mapping[str, Any]
    params: Mapping[str, Any] = field(default_factory=dict)
    test: int | None = None
    near: str = ""

    def changed(self, changes: Mapping[str, Any]) -> Source:
        """The same with other arguments, as flags give them."""
        if not changes:
            return self
        said = ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in changes.items())
        return Source(f"{self.title}, {said}", self.flag, {**self.arguments, **changes}, self.params, None, self.near)

    def text(self, policy: Policy) -> Attention:
        """The attention itself; ``policy`` is the first, against which an adversary is made.

        Raises:
            UsageError, PolicyError: the arguments make no sense; the latter where a policy's own test says them.
        """
        from kvpolicy.testing.feeding import plan_for
        from kvpolicy.testing.traces import text_of

        try:
            return text_of(self.arguments, near=self.near, plan_of=lambda said: plan_for(policy, said))
        except Complaint as complaint:
            if self.test is not None:
                place = ("tests", self.test, "attention")
                raise PolicyError(diagnostics=[policy.diagnostic(place, complaint)]) from None
            where = "".join(f" `{part}`:" for part in complaint.path[:1] if part not in ("pattern", "trace"))
            hint = f"; {complaint.hint}" if complaint.hint else ""
            raise UsageError(f"{self.flag}:{where} {complaint.reason}{hint}") from None


def source(pattern: str | None, test: str | None, trace: str | None, policy: Policy) -> Source:
    """The one source that was named; ``policy`` is the one whose tests are meant.

    Raises:
        UsageError: none or several were named, or there is no such test.
    """
    named = [
        flag for flag, value in (("--pattern", pattern), ("--test", test), ("--trace", trace)) if value is not None
    ]
    if len(named) != 1:
        reason = f"{' and '.join(named)} both give a text; drop one" if named else "which text?"
        raise UsageError(reason if named else f"{reason} --pattern, --test or --trace gives one, {SPELLING}")
    if pattern is not None:
        arguments = read_pattern(pattern)
        return Source(title(arguments), "--pattern", arguments)
    if trace is not None:
        return Source(f"trace {shown(trace)}", "--trace", {"trace": trace})
    number = test_number(str(test), policy)
    own = policy.tests[number]
    near = policy.source
    return Source(f"test “{own.name}” of {policy.name}", "--test", own.attention, own.set, number, near)


def title(arguments: Mapping[str, Any]) -> str:
    """A pattern and its arguments, for a reader; of a mixture, its parts."""
    rest = {key: value for key, value in arguments.items() if key not in ("pattern", "parts")}
    said = ", ".join(f"{key} {_plain(value)}" for key, value in rest.items())
    parts = arguments.get("parts")
    if isinstance(parts, list) and all(isinstance(part, dict) and "pattern" in part for part in parts):
        return " + ".join(title(part) for part in parts) + (f"; {said}" if said else "")
    return f"{shown(arguments['pattern'])}{f' ({said})' if said else ''}"


def _plain(value: Any) -> str:
    """A value without brackets and quotes."""
    if isinstance(value, dict):
        return " ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return " and ".join(map(_plain, value)) if isinstance(value, list) else shown(value)


def test_number(asked: str, policy: Policy) -> int:
    """Which test a number from 1, a name, or a part of one means. Raises UsageError."""
    names = [test.name for test in policy.tests]
    if not names:
        raise UsageError(f"--test {shown(asked)!r}: {policy.name} has no tests")
    if asked.isascii() and asked.isdigit() and 1 <= int(asked) <= len(names):
        return int(asked) - 1
    found = [number for number, name in enumerate(names) if name == asked]
    found = found or [number for number, name in enumerate(names) if asked.lower() in name.lower()]
    if len(found) == 1:
        return found[0]
    listed = "; ".join(f"{number} {name}" for number, name in enumerate(names, 1))
    reason = f"{plural(len(found), 'test')} of {policy.name} " + ("has" if not found else "have") + " this in the name"
    raise UsageError(f"--test {shown(asked)!r}: {reason}; there are: {listed}")


def read_pattern(text: str) -> dict[str, Any]:
    """`milestone,at=40,until=90`, or a mapping as a test has it, `{pattern: milestone, at: 40, until: 90}`.

    Raises:
        UsageError: it is neither.
    """
    flow = text.strip()
    if not flow.startswith("{"):
        flow = "{" + ", ".join(_pairs(text)) + "}"
    try:
        data = typed(read(flow, "--pattern").data())
    except PolicyError as error:
        raise UsageError(f"--pattern {shown(text)!r}: {error.diagnostics[0].reason}; write it {SPELLING}") from None
    if not isinstance(data, dict) or not isinstance(data.get("pattern"), str):
        raise UsageError(f"--pattern {shown(text)!r} names no pattern; write it {SPELLING}")
    return data


def _pairs(text: str) -> Iterator[str]:
    """`name,key=value,…` as pairs of YAML; commas inside brackets and quotes belong to a value."""
    name, *items = split(text)
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise UsageError(f"--pattern {shown(text)!r} does not begin with a pattern's name; write it {SPELLING}")
    yield f"pattern: {name}"
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (equals and value and re.fullmatch(r"[a-z][a-z0-9_-]*", key)):
            raise UsageError(f"--pattern: {shown(item)!r} is not NAME=VALUE, {SPELLING}")
        yield f"{key}: {value}"


def split(text: str) -> list[str]:
    """At the commas that stand outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def with_settings(policies: Sequence[Policy], settings: Mapping[str, str], given: Mapping[str, Any]) -> list[Policy]:
    """The policies, each with those ``settings`` that it has a param for; the first also with ``given``.

    Raises:
        UsageError, PolicyError: a param that none of them has, or a value that does not fit.
    """
    for name in settings:
        if len(policies) > 1 and not any(name in policy.params for policy in policies):
            names = ", ".join(dict.fromkeys(policy.name for policy in policies))
            known = [param for policy in policies for param in policy.params]
            raise UsageError(f"--set {name}: none of {names} has such a param; {nearest(name, known)}")
    bound = []
    for number, policy in enumerate(policies):
        own = {name: value for name, value in settings.items() if len(policies) == 1 or name in policy.params}
        values = {**(given if number == 0 else {}), **own}
        bound.append(policy.bind(**values) if values else policy)
    return bound
