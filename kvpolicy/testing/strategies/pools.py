"""Pools and scorers, drawn as the plain data of a policy's YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvpolicy.language.signals import SIGNALS
from kvpolicy.testing.strategies.pen import Pen
from kvpolicy.testing.strategies.support import probe

Answers = dict[str, Any]

# Roughly how much a signal is worth: bars for `hit: {above: …}` that some units reach and others miss.
BARS = {
    "attention": ("0.1", "0.03", "0.3"),
    "gumbel-attention": ("0.1", "0.03", "0.3"),
    "random": ("0.5",),
    "recency": ("8", "3"),
    "lag": ("-0.5", "0", "1"),
}


def signal(pen: Pen) -> str | Answers:
    """A signal's name, or its name with arguments."""
    names = [name for name in ("attention", *SIGNALS) if pen.runs(probe({"scorer": {"signal": name}}))]
    name = pen.pick(names)
    if name == "random" and pen.chance(2):
        return {name: {"seed": pen.known(pen.number(0, 9))}}
    if name == "key-similarity" and pen.chance(2):
        return {name: {"above": pen.pick(("0.5", "0.2")), "keep": "newest"}}
    if name == "gumbel-attention" and pen.chance(2):
        arguments = {"temperature": pen.pick(("1", "0.5", "3")), "growth": pen.pick(("0.01", "0", "0.5"))}
        return {name: {**arguments, "seed": pen.known(pen.number(0, 9))}}
    if name == "lag":  # the default is longer than the texts that are drawn
        return {name: {"lag": pen.known(pen.number(1, 6)), "after": pen.known(pen.number(0, 3))}}
    return name


def scorer(pen: Pen, others: Sequence[str], pools: Sequence[str], *, depth: int = 0, reading: bool = False) -> Answers:
    """A scorer: mostly a signal through some stages, now and then a sum or product of several."""
    if depth < 2 and pen.chance(6):
        kind = pen.pick(("sum", "product"))
        parts = [scorer(pen, others, pools, depth=depth + 1, reading=reading) for _ in range(pen.number(1, 3))]
        return {**({"weight": weight(pen)} if pen.chance(4) else {}), kind: parts}
    said = signal(pen)
    name = said if isinstance(said, str) else next(iter(said))
    stages: Answers = {"signal": said}
    if SIGNALS[name].queries:
        stages |= queried(pen, name, reading)
    if pen.chance(6):
        stages["smooth"] = {pen.pick(("max", "mean")): pen.known(2 * pen.number(0, 3) + 1)}
    if pen.chance(6):
        stages["norm"] = pen.pick(("max", "softmax", "mass"))
    memory = "none" if reading else pen.pick(("none", "sum", "none", "decay", "max-decay", "last-hit", "recurrence"))
    if memory in ("last-hit", "recurrence") or pen.chance(6):
        stages["hit"] = hit(pen, name, others, pools)
    if SIGNALS[name].softmax or "top" in stages.get("hit", ()):
        over = pen.pick(("cache", "cache", "pool", "candidates"))
        stages |= {"over": over} if over != "cache" or pen.chance(3) else {}
    if memory in ("decay", "max-decay"):
        stages["memory"] = {memory: pen.known(pen.pick(("0.9", "50%", "1", "0", "0.75")))}
    elif memory == "recurrence":
        stages["memory"] = {memory: pen.known(pen.pick(("0.5", "1", "0")))}
    elif memory != "none" or pen.chance(8):
        stages["memory"] = memory
    if pen.chance(4):
        stages["weight"] = weight(pen)
    return stages


def queried(pen: Pen, name: str, reading: bool) -> Answers:
    """Stages of a signal that looks at queries."""
    stages: Answers = {}
    last = {"last": pen.known(pen.number(1, 5))}
    ways: list[Any] = ["current", "all", "all"]
    if not reading and pen.runs(probe({"scorer": {"signal": name, "queries": {"last": 2}}})):
        ways.append(last)
    queries = pen.pick(ways)
    if queries != "current" or pen.chance(2):
        stages["queries"] = queries
    reductions: list[Any] = ["mean", "max", "sum", *([{"logits": "max"}] if SIGNALS[name].softmax else [])]
    heads = pen.pick(reductions)
    if heads != "mean" or pen.chance(6):
        stages["heads"] = heads
    return stages


def hit(pen: Pen, name: str, others: Sequence[str], pools: Sequence[str]) -> Answers:
    if pen.number(0, 2) < 2:
        return {"top": pen.share(others, pools)}
    return {"above": pen.known(pen.pick(BARS.get(name, ("0.5", "0", "1"))))}


def weight(pen: Pen) -> str:
    return pen.known(pen.pick(("-1", "0.5", "2", "-0.25", "0")))


def pool(pen: Pen, name: str, others: Sequence[str], pools: Sequence[str], *, limited: bool = False) -> Answers:
    """A pool's answers but for who enters; ``others`` are pools whose sizes it may read, ``limited``: with a budget."""
    answers: Answers = {}
    page, fits = 1, 1  # ``fits``: tokens that go into a page for certain, however its size is written
    if pen.chance(3):
        page = pen.number(1, 4)
        fits = page if pen.number(0, 5) < 5 else 1
        answers["page"] = pen.known(page) if fits == page else pen.planned(1, page)
    protected = 0
    if pen.chance(2):
        answers["window"], count = pen.reach(others, pools)
        protected += count
    if pen.chance(3):
        answers["pinned"], count = pinned(pen, others, pools)
        protected += count
    if limited or pen.number(0, 7) < 7:
        answers["budget"] = pen.budget(max(page, protected), others, pools)
    if pen.number(0, 7):
        answers["scorer"] = scorer(pen, others, pools)
    if pen.chance(3):
        answers["update"] = pen.pick(({"every": pen.planned(1, 6)}, "prompt-end", "every-step"))
    evict = evicted(pen, name)
    if evict:
        answers["evict"] = evict
    if evict.get("scope") == "across-heads" and not pen.runs(probe({"evict": {"scope": "across-heads"}})):
        answers["update"] = "prompt-end"
    stored(pen, answers, others, pools, fits)
    return answers


def pinned(pen: Pen, others: Sequence[str], pools: Sequence[str]) -> tuple[Any, int]:
    """A way to pin, or several, and how many tokens they protect for certain."""
    ways: list[Any] = ["survivors"]
    if pen.runs(probe({"pinned": {"tokens": "special"}})):
        ways.append({"tokens": "special"})
    first, count = pen.reach(others, pools)
    form = pen.number(0, 5)
    if form < 3:
        return {"first": first}, count
    if form < 5:
        return pen.pick(ways), 0
    return [pen.pick(ways), {"first": first}], count


def evicted(pen: Pen, name: str) -> Answers:
    answers: Answers = {}
    if pen.chance(4):
        answers["scope"] = pen.pick(
            [scope for scope in ("layer", "kv-head", "across-heads") if decides(pen, name, scope)]
        )
        if answers["scope"] == "across-heads" and pen.chance(2):
            answers["floor"] = pen.known(pen.pick(("20%", "0", "1")))
    return answers


def decides(pen: Pen, name: str, scope: str) -> bool:
    """Whether the heads of a pool may decide so; a pool of the prompt may be able to do so at its end alone."""
    if name == "prompt" and scope == "across-heads":
        prompt = {"admit": "prompt", "budget": 8, "update": "prompt-end", "evict": {"scope": scope}}
        return pen.runs({"kvpolicy": 1, "name": "probe", "pools": {name: prompt, "rest": {"admit": "all"}}})
    return pen.runs(probe({"evict": {"scope": scope}}))


def stored(pen: Pen, answers: Answers, others: Sequence[str], pools: Sequence[str], page: int) -> None:
    """What is read and how it is stored; groups by channel must fit a page of so many tokens."""
    if pen.runs(probe({"read": {"top": 4, "scorer": {"signal": "attention"}}})) and pen.chance(6):
        top = pen.pick((str(pen.number(5, 12)), f"max(8, {pen.expression(others, pools, 1)})", "50% * context + 8"))
        answers["read"] = {"top": top, "scorer": scorer(pen, others, pools, reading=True)}
    elif pen.chance(16):
        answers["read"] = "all"
    if pen.runs(probe({"store": {"bits": 8, "keys": "token"}})) and pen.chance(6):
        group = pen.number(1, 4)
        ways = ("channel", "token") if page % group == 0 else ("token",)
        answers["store"] = {"bits": pen.pick((8, 4, 2)), "group": pen.known(group), "keys": pen.pick(ways)}
        if pen.chance(2) or ways == ("token",):
            answers["store"]["values"] = pen.pick(ways)
    elif pen.chance(16):
        answers["store"] = "model"
