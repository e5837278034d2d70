"""One item of a test's `expect`, read as a claim; mistakes know their place in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvpolicy.language import Quantity, QuantityError
from kvpolicy.language.base import Complaint
from kvpolicy.language.nodes import shown
from kvpolicy.language.vocabulary import nearest
from kvpolicy.plan import Plan
from kvpolicy.testing.arguments import READERS, read_arguments
from kvpolicy.testing.claims import CLAIMS, Claim, Which
from kvpolicy.testing.tokens import read_tokens


def read_claim(written: Mapping[str, Any], plan: Plan, length: int) -> Claim:
    """The claim that one item of `expect` makes of a text whose shortest row has ``length`` tokens.

    Raises:
        Complaint: an unknown claim or argument, or one that can say nothing here; its path leads to the culprit.
    """
    named = [key for key in written if key in CLAIMS]
    if len(named) != 1:
        key = next((key for key in written if key not in named[:1]), "")
        reason = "one claim at a time" if named else f"`{shown(key)}` is no claim"
        raise Complaint(reason, "" if named else nearest(key, CLAIMS), (key,), "key")
    name = named[0]
    kind, given = CLAIMS[name], {key: value for key, value in written.items() if key != name}
    main = written[name]
    given |= main if isinstance(main, Mapping) else {kind.MAIN: main}

    def place(argument: str | int) -> tuple[str | int, ...]:
        if isinstance(main, Mapping) and argument in main:
            return (name, argument)
        return (argument,) if argument in written else (name,)

    try:
        claim = kind(**read_arguments(kind, given, readers(plan, length)))
        claim.check(plan, length)
    except Complaint as complaint:
        complaint.path = place(complaint.path[0]) + complaint.path[1:] if complaint.path else (name,)
        raise
    return claim


def readers(plan: Plan, length: int) -> Mapping[str, Callable[[Any], Any]]:
    """How to read an argument, by its annotation."""

    def which(value: Any) -> Which:
        words = ("prompt", "all", "window")
        if isinstance(value, str) and value in words:
            return value
        if isinstance(value, str) and value[:1].isalpha():
            raise Complaint(f"`{shown(value)}` is neither positions nor a word for them", nearest(value, words))
        return read_tokens(value, length)

    def quantity(value: Any) -> Quantity:
        try:
            read = Quantity.parse(str(value)).fold({name: param.value for name, param in plan.policy.params.items()})
            read = read.fold({"max_new_tokens": plan.max_new_tokens})
        except QuantityError as error:
            raise Complaint(error.reason, error.hint, (), "value", error.offset, error.width) from None
        names = ("t", "prompt_len", "context")
        for unknown in sorted(read.names - {*names}):
            hint = nearest(unknown, [*names, *plan.policy.params])
            raise Complaint(f"`{unknown}` has no value here", hint, word=unknown)
        return read

    return {
        **READERS,
        "str": str,
        "Tokens": lambda value: read_tokens(value, length),
        "Moments": lambda value: read_tokens(value, length) if value != [] else (),
        "Which": which,
        "Quantity": quantity,
    }
