"""Whole policies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvpolicy.errors import PolicyError
from kvpolicy.language import loads_policy
from kvpolicy.testing.strategies.pen import Pen, Source
from kvpolicy.testing.strategies.pools import Answers, pool
from kvpolicy.testing.strategies.support import probe, refused, runs, written

Document = dict[str, Any]

WORD = re.compile(r"[a-z_0-9]+")

LAYOUTS: tuple[dict[str, Any], ...] = (  # pool -> who enters, simple ones first; None is fed by another pool
    {"all": "all"},
    {"prompt": "prompt", "generated": "generated"},
    {"all": "all"},
    {"prompt": "prompt", "generated": "generated"},
    {"prompt": "prompt", "rest": "all"},
    {"generated": "generated", "rest": "all"},
    {"generated": "generated", "prompt": "prompt"},
    {"all": "all", "cold": None},
    {"prompt": "prompt", "generated": "generated", "cold": None},
    {"marks": {"tokens": "special"}, "all": "all"},
    {"marks": {"tokens": "special"}, "prompt": "prompt", "generated": "generated"},
    {"images": {"modality": "image"}, "rest": "all"},
)


def draw_policy(source: Source, *, supported: bool = False) -> str | None:
    """A valid policy from the whole language as YAML; None where what was drawn is not one, which is rare.

    supported: only such as the runtime runs (``plan.unsupported`` decides).
    """
    pen = Pen(source, runs) if supported else Pen(source)
    layouts = [layout for layout in LAYOUTS if pen.runs(as_policy(layout))]
    pools = drawn_pools(pen, pen.pick(layouts))
    document: Document = {"kvpolicy": 1, "name": "drawn", "pools": pools}
    document |= around(pen, pools)
    document |= names_used(pen, written(document))
    text = written(document)
    try:
        policy = loads_policy(text, "drawn")
    except PolicyError:
        return None
    return None if supported and refused(policy) else text


def names_used(pen: Pen, text: str) -> Document:
    """The params and `let` names that a text mentions; what it was to say was sometimes drawn and then left out."""
    wanted, found = WORD.findall(text), set[str]()
    while wanted:
        word = wanted.pop()
        if word not in found and (word in pen.let or word in pen.params):
            found.add(word)
            wanted += WORD.findall(pen.let.get(word, ""))
    kinds: dict[str, Mapping[str, object]] = {"params": pen.params, "let": pen.let}
    used = {kind: {name: at for name, at in names.items() if name in found} for kind, names in kinds.items()}
    return {kind: names for kind, names in used.items() if names}


def as_policy(layout: dict[str, Any]) -> Document:
    """A layout without any answers, to ask whether it runs."""
    pools: dict[str, Answers] = {name: {"admit": who} if who else {} for name, who in layout.items()}
    feeds(layout, pools)
    return {"kvpolicy": 1, "name": "probe", "pools": pools}


def feeds(layout: dict[str, Any], pools: dict[str, Answers]) -> None:
    """Pools that nobody enters are fed by the first one."""
    for name, who in layout.items():
        if who is None:
            source = next(other for other in layout if layout[other] is not None)
            pools[source] |= {"evict": {**pools[source].get("evict", {}), "to": name}}
            pools[source].setdefault("budget", 4)
            move_whole(pools[source], pools[name])


def move_whole(source: Answers, fed: Answers) -> None:
    """Units keep their size when they move, and each head moves its own, unless all move the same."""
    if source.get("evict", {}).get("scope") != "layer" and fed.get("evict", {}).get("scope") == "layer":
        del fed["evict"]
    if source.get("page") != fed.get("page"):
        fed.pop("page", None)
        fed.pop("store", None)
        fed |= {"page": source["page"]} if "page" in source else {}


def drawn_pools(pen: Pen, layout: dict[str, Any]) -> dict[str, Answers]:
    """A layout's pools with answers. A pool may read the sizes of those before it in an order of their own."""
    order = list(layout) if pen.number(0, 1) == 0 or None in layout.values() else list(layout)[::-1]
    pools: dict[str, Answers] = {}
    for name, who in layout.items():
        admit: Answers = {} if who is None else {"admit": who}
        # A pool that feeds another is updated before it, so it may not wait for that one.
        pools[name] = admit | pool(pen, name, order[: order.index(name)], list(layout))
    feeds(layout, pools)
    return pools


def around(pen: Pen, pools: dict[str, Answers]) -> Document:
    """Top-level keys beside pools and names."""
    top: Document = {}
    if pen.chance(12):
        top |= {"summary": "Drawn by a search for counter-examples.", "cite": ["arXiv:0000.00000"]}
    if pen.chance(8):
        top["total"] = pen.known(pen.pick((4096, 64, 48)))
    for key, value in (("positions", "compact"), ("prompt_chunk", pen.number(1, 9))):
        if pen.chance(10) and pen.runs(probe() | {key: value}):
            top[key] = value
    if pen.chance(20):
        top["positions"] = top.get("positions", "absolute")
    if pen.chance(4):
        top["overrides"] = [override(pen, pools) for _ in range(pen.number(1, 2))]
    if pen.chance(20):  # the parent's pool goes, unless the child has one of that name
        top["extends"] = "dense"
        if "all" not in pools:
            pools["all"] = None  # type: ignore[assignment]
    return top


def override(pen: Pen, pools: dict[str, Answers]) -> Document:
    """Other answers for some layers or heads."""
    where: Document = {"layers": pen.pick((0, -1, "0..-1", [0, -1]))}
    if pen.runs(probe(overrides=[{"heads": [[0, 0]], "dense": True}])) and pen.chance(4):
        where = {"heads": [[pen.pick((0, -1)), 0]]}
    form = pen.number(0, 3)
    if form == 0:
        return {**where, "dense": True}
    name = pen.pick([name for name in pools if pools[name] is not None])
    if form == 1:
        return {**where, "pools": {name: {"update": pen.pick(({"every": pen.planned(1, 6)}, "prompt-end"))}}}
    if form == 2:
        return {**where, "pools": {name: {"scorer": None, "window": None}}}
    return {**where, "pools": {name: answered_anew(pen, name, list(pools), pools)}}


def answered_anew(pen: Pen, name: str, names: Sequence[str], pools: dict[str, Answers]) -> Answers:
    """Every answer of a pool, those left out given back their defaults; what it sends on stays."""
    fresh = pool(pen, name, (), [other for other in names if pools[other] is not None], limited=True)
    if "to" in pools[name].get("evict", {}):
        fresh["evict"] = {**fresh.get("evict", {}), "to": pools[name]["evict"]["to"]}
    if any("to" in (answers or {}).get("evict", {}) for answers in pools.values()):
        move_whole(pools[name], fresh)
    return {**{key: None for key in pools[name] if key not in ("admit", *fresh)}, **fresh}
