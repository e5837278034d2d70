"""Policies with one answer changed, to see whether a policy's own tests notice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import yaml

from kvpolicy.errors import PolicyError
from kvpolicy.language import Policy, loads_policy

Answers = dict[str, Any]


def mutants(policy: Policy) -> dict[str, Policy]:
    """What was changed -> the policy so changed; what the language refuses is left out.

    ``total`` goes, since it would refuse a wrong budget before a test could; and what is said is cut to one layer.
    """
    document = yaml.safe_load(policy.to_yaml())
    document.pop("total", None)
    for test in document["tests"]:
        if not any(
            "layer" in arguments
            for claim in test["expect"]
            for arguments in claim.values()
            if isinstance(arguments, dict)
        ):
            test["attention"]["layers"] = 1
    others = {"no overrides": without(document, "overrides")} if "overrides" in document else {}
    for name, answers in document["pools"].items():
        for what, changed in changes(answers):
            others[f"{name}: {what}"] = {**document, "pools": {**document["pools"], name: changed}}
    if any("heads" in override for override in document.get("overrides", ())):  # heads that differ share no set
        others = {what: other for what, other in others.items() if not what.endswith("one set per layer")}
    found = {}
    for what, other in others.items():
        with contextlib.suppress(PolicyError):
            found[what] = loads_policy(yaml.safe_dump(other, sort_keys=False))
    return found


def changes(answers: Answers) -> Iterator[tuple[str, Answers]]:
    """One pool's answers: each left out, turned around, or one unit off."""
    page = answers.get("page", 1)
    if "page" in answers:
        yield "no page", without(answers, "page")
    if "read" in answers:
        yield from ((f"read {what}", {**answers, "read": read}) for what, read in readings(answers["read"], page))
    if "budget" not in answers:
        yield "a budget", {**answers, "budget": f"2 * {page}"}
        return
    for what, change in {"+": f"+ {page}", "-": f"- {page}", "without end": "+ 4096"}.items():
        yield f"budget {what}", {**answers, "budget": f"({answers['budget']}) {change}"}
    for what, change in {"+": "+ 1", "-": "- 1", "none": "* 0"}.items():
        if "window" in answers:
            yield f"window {what}", {**answers, "window": f"({answers['window']}) {change}"}
        if "first" in answers.get("pinned", ()):
            yield f"first {what}", {**answers, "pinned": {"first": f"({answers['pinned']['first']}) {change}"}}
    if answers.get("pinned") == "survivors":
        yield "nobody pinned", without(answers, "pinned")
    if "tokens" in answers.get("pinned", ()):
        yield "special tokens unpinned", without(answers, "pinned")
    update = answers.get("update", {"every": 1})
    if isinstance(update, dict):
        yield "updates one step apart", {**answers, "update": {"every": f"({update['every']}) + 1"}}
    if "update" in answers:
        yield "updates at every step", without(answers, "update")
    if "evict" in answers:
        yield "one set per KV head", without(answers, "evict")
    if "scorer" in answers:
        yield from ((what, {**answers, "scorer": scorer}) for what, scorer in scorers(answers["scorer"]))
        if "evict" not in answers:
            yield "one set per layer", {**answers, "evict": {"scope": "layer"}}


def readings(read: Answers, page: int | str) -> Iterator[tuple[str, Answers | str]]:
    """A reading of everything, of a page more or less, or by another ranking."""
    yield "all", "all"
    for what, change in {"+": f"+ {page}", "-": f"- {page}"}.items():
        yield what, {**read, "top": f"({read['top']}) {change}"}
    yield from ((f"by {what}", {**read, "scorer": scorer}) for what, scorer in scorers(read["scorer"]))


def scorers(scorer: Answers) -> Iterator[tuple[str, Answers]]:
    """A scorer, turned around, deaf, or with a stage left out."""
    yield "lowest for highest", {**scorer, "weight": f"-({scorer.get('weight', 1)})"}
    yield "recency for the signal", {**scorer, "signal": "recency"}
    for key in sorted(scorer.keys() - {"signal", "hit"}):
        yield f"scorer without {key}", without(scorer, key)
    if "top" in scorer.get("hit", ()):
        yield "nobody hit", {**scorer, "hit": {"top": f"0 * ({scorer['hit']['top']})"}}


def without(answers: Answers, key: str) -> Answers:
    return {other: value for other, value in answers.items() if other != key}
