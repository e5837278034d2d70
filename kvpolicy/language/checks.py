"""What a policy's answers must be together: pools that fill, sizes that fit, stages that do something.

Every check yields complaints with the path they belong to; none needs a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from math import floor

from kvpolicy.language.base import Complaint, KnownMistake
from kvpolicy.language.definitions import IDENTIFIER, Path, Placed, walk_cycle
from kvpolicy.language.nodes import shown
from kvpolicy.language.override import overridden
from kvpolicy.language.policy import Policy
from kvpolicy.language.pool import Pool
from kvpolicy.language.quantity import Quantity
from kvpolicy.language.scope import Scope, listed
from kvpolicy.language.scorer import Scorer
from kvpolicy.language.signals import definition
from kvpolicy.language.vocabulary import nearest


def check(policy: Policy) -> Iterator[Placed]:
    """Every mistake in a policy whose parts are well formed."""
    if not policy.pools:
        yield ("pools",), Complaint("a policy has at least one pool", f"as in `all: {Pool.EXAMPLE}`", (), "key")
        return
    base = list(check_pools(policy.pools))
    for where, complaint in base:
        yield ("pools", *where), complaint
    known = {(where, complaint.reason) for where, complaint in base}
    for index, override in enumerate(policy.overrides):
        if override.pools is not None:
            for where, complaint in check_pools(overridden(policy.pools, override.pools)):
                if (where, complaint.reason) not in known:
                    complaint.reason += ", in the layers or heads of this override"
                    yield ("overrides", index, "pools", *where), complaint
    yield from check_tests(policy)


def check_pools(pools: Mapping[str, Pool]) -> Iterator[Placed]:
    """The pools of some layers, as a whole and one by one."""
    yield from check_admission(pools)
    yield from check_transfers(pools)
    yield from check_order(pools)
    for name, pool in pools.items():
        if not IDENTIFIER.fullmatch(name):
            hint = "use letters, digits and `_`, a letter first, so that `size(…)` can name it"
            yield (name,), Complaint(f"`{shown(name)}` cannot be a pool's name", hint, (), "key")
        for where, complaint in (*check_sizes(pool), *check_scorers(pool)):
            yield (name, *where), complaint


# Who feeds whom --------------------------------------------------------------------------------------------------


def check_admission(pools: Mapping[str, Pool]) -> Iterator[Placed]:
    """Every token must find a pool, and every pool some tokens."""
    taken: dict[str, str] = {}
    fed = {pool.evict.to for pool in pools.values()}
    for name, pool in pools.items():
        if pool.admit is None and name not in fed:
            near = nearest(name, pools.keys() - {name})
            hint = "give it `admit`, or send it another pool's tokens with `evict: {to: …}`"
            hint = f"{near} else {hint}" if near.startswith("did") else hint
            yield (name,), Complaint(f"nothing feeds the pool `{shown(name)}`", hint, (), "key")
        # Special tokens and images come in prompts.
        rivals = {kind: ("prompt",) if kind in ("special", "image") else (kind,) for kind in pool.admits}
        if rivals and all(kind in taken or all(rival in taken for rival in rivals[kind]) for kind in rivals):
            takers = {taken[rival] for kind in rivals for rival in (kind, *rivals[kind]) if rival in taken}
            reason = f"the pool `{shown(name)}` never receives a token: all go to {listed(sorted(takers))}, above it"
            yield (name, "admit"), Complaint(reason, "pools are read top-down: move it up, or admit something else")
        for kind in pool.admits:
            taken.setdefault(kind, name)
    for kind in ("prompt", "generated"):
        if kind not in taken:
            hint = f"add `{kind}: {{admit: {kind}}}`, which keeps them all"
            yield (), Complaint(f"no pool admits {kind} tokens", hint, (), "key")


def check_transfers(pools: Mapping[str, Pool]) -> Iterator[Placed]:
    """`evict: {to: pool}` must name another pool, and have something to send."""
    for name, pool in pools.items():
        to, where = pool.evict.to, (name, "evict", "to")
        if to is None:
            continue
        if to == name:
            yield (
                where,
                Complaint("a pool cannot evict to itself", "name another pool, or leave `to` out to drop tokens"),
            )
        elif to not in pools:
            hint = nearest(to, pools.keys() - {name}) or "add that pool, or leave `to` out to drop tokens"
            yield where, Complaint(f"there is no pool `{shown(to)}` to evict to", hint)
        elif pool.budget is None:
            yield where, Complaint(f"`{shown(name)}` has no budget, so it never sends anything", "give it a budget")
        elif "generated" in pools[to].admits:
            reason = f"`{shown(to)}` admits generated tokens, so no other pool can send it units"
            yield where, Complaint(reason, "let it admit the prompt, or nothing, and feed it from here alone")
        elif pools[to].evict.scope == "layer" and pool.evict.scope != "layer":
            reason = f"`{shown(to)}` keeps one set for all heads, but each head sends it units of its own"
            yield where, Complaint(reason, f"give `{shown(name)}` the scope `layer` too, or `{shown(to)}` another one")
        elif whole(pool.page) != whole(pools[to].page):
            pages = f"`{shown(name)}` has pages of {pool.page.text}, `{shown(to)}` of {pools[to].page.text}"
            yield where, Complaint(f"units move whole, and {pages}", "give both pools the same `page`")


def check_order(pools: Mapping[str, Pool]) -> Iterator[Placed]:
    """Pools are updated one after another: those whose size is asked for, and those that send, come first."""
    before: dict[str, set[str]] = {name: set() for name in pools}
    causes: dict[tuple[str, str], tuple[Path, str]] = {}
    for name, pool in pools.items():
        for where, quantity in quantities(pool):
            for asked in (word[5:-1] for word in quantity.names if word.startswith("size(")):
                before[name].add(asked)
                causes.setdefault((name, asked), ((name, *where), f"size({asked})"))
        if pool.evict.to in pools and pool.evict.to != name:
            before[str(pool.evict.to)].add(name)
            causes.setdefault((str(pool.evict.to), name), ((name, "evict", "to"), ""))
    try:
        TopologicalSorter(before).prepare()
    except CycleError as error:
        cycle = set(error.args[1])
        first = min(cycle, key=list(pools).index)
        way = walk_cycle(first, before, cycle)
        where, word = causes[way[0], way[1]]
        reason = "pools wait for one another: " + " after ".join(f"`{name}`" for name in way)
        reason = f"the pool `{first}` waits for its own size" if len(cycle) == 1 else reason
        hint = "`size(pool)` and `to` may only look at pools that do not depend on this one"
        yield where, Complaint(reason, hint, word=word)


def quantities(pool: Pool) -> Iterator[tuple[Path, Quantity]]:
    """Every quantity of a pool that may change while text grows."""
    for key in ("budget", "window"):
        if getattr(pool, key) is not None:
            yield (key,), getattr(pool, key)
    for index, pin in enumerate(pool.pinned):
        if pin.first is not None:
            yield ("pinned", index, "first"), pin.first
    if pool.read is not None:
        yield ("read", "top"), pool.read.top
    for where, scorer in all_scorers(pool):
        if scorer.hit is not None and scorer.hit.top is not None:
            yield (*where, "hit", "top"), scorer.hit.top


# Sizes -----------------------------------------------------------------------------------------------------------


def check_sizes(pool: Pool) -> Iterator[Placed]:
    """Numbers that are known already must fit into each other."""
    budget, window, page = whole(pool.budget), whole(pool.window) or 0, whole(pool.page) or 1
    pins = [(index, whole(pin.first) or 0) for index, pin in enumerate(pool.pinned) if pin.first is not None]
    if pool.read is not None and (whole(pool.read.top) or page) < page:
        reason = f"reading {whole(pool.read.top)} tokens is less than one page of {page}"
        yield ("read", "top"), Complaint(reason, f"read {page} or more")
    if pool.store is not None and "channel" in (pool.store.keys, pool.store.values):
        group = whole(pool.store.group)
        if group is not None and group > 0 and page % group:
            reason = f"groups by channel run along the tokens of a page, and {group} do not fit a page of {page}"
            yield ("store", "group"), Complaint(reason, f"make `page` a multiple of {group}, or group by token")
    if budget is None:
        return
    if budget < page:
        yield ("budget",), Complaint(f"the budget ({budget}) is smaller than one page ({page})", "pages are kept whole")
    if window > budget:
        reason = f"the window ({window}) is larger than the budget ({budget})"
        yield ("window",), Complaint(reason, "raise the budget, or shrink the window")
        return
    for index, first in pins:
        if first + window > budget:
            also = f" and the window ({window})" if window else ""
            reason = f"the first {first} tokens{also} are more than the budget ({budget})"
            yield ("pinned", index, "first"), Complaint(reason, "raise the budget, or protect fewer")


def whole(quantity: Quantity | None) -> int | None:
    """A number of tokens, where it is known already."""
    return None if quantity is None or quantity.constant is None else floor(quantity.constant)


# Scorers ---------------------------------------------------------------------------------------------------------

STAGES = ("queries", "over", "heads", "smooth", "norm", "hit", "memory")


def all_scorers(pool: Pool) -> Iterator[tuple[Path, Scorer]]:
    """Every scorer of a pool, combined ones before their parts."""
    if pool.scorer is not None:
        yield from with_parts(("scorer",), pool.scorer)
    if pool.read is not None:
        yield from with_parts(("read", "scorer"), pool.read.scorer)


def with_parts(where: Path, scorer: Scorer) -> Iterator[tuple[Path, Scorer]]:
    yield where, scorer
    key = "product" if scorer.product else "sum"
    for index, part in enumerate(scorer.parts):
        yield from with_parts((*where, key, index), part)


def check_scorers(pool: Pool) -> Iterator[Placed]:
    """Stages that could do nothing are mistakes: whoever wrote them expects an effect."""
    for where, scorer in all_scorers(pool):
        complaints = check_stages(scorer) if scorer.signal else check_combination(scorer)
        for key, complaint in complaints:
            yield (*where, key), complaint
        if where[0] == "read":
            for key, complaint in check_reading(scorer):
                yield (*where, key), complaint
    if "floor" in pool.evict.model_fields_set and pool.evict.scope != "across-heads":
        reason = "`floor` is what heads keep when they compete"
        yield ("evict", "floor"), Complaint(reason, "add `scope: across-heads`, or remove it", (), "key")


def check_stages(scorer: Scorer) -> Iterator[tuple[str, Complaint]]:
    assert scorer.signal is not None
    given, name = scorer.model_fields_set, scorer.signal.name
    if scorer.memory.kind in ("last-hit", "recurrence") and scorer.hit is None:
        hint = "add `hit: {top: 50%}` or `hit: {above: …}`"
        yield "memory", Complaint(f"`{scorer.memory.kind}` remembers hits, but nothing says what a hit is", hint)
    signal = definition(name)
    for key in ("queries", "heads"):
        if key in given and not signal.queries:
            yield key, Complaint(f"`{name}` looks at no query, so `{key}` says nothing", "remove it", (), "key")
    ranks = scorer.hit is not None and scorer.hit.top is not None
    if "over" in given and not signal.softmax and not ranks:
        reason = f"`{name}` is no softmax and nothing is ranked, so `over` says nothing"
        yield "over", Complaint(reason, "remove it, or add `hit: {top: …}`", (), "key")
    if scorer.heads == "logits-max" and signal.queries and not signal.softmax:
        yield "heads", Complaint(f"`{name}` has no softmax to go before", "write `heads: max`")


def check_combination(scorer: Scorer) -> Iterator[tuple[str, Complaint]]:
    kind = "sum" if scorer.sum is not None else "product"
    if not scorer.parts:
        yield kind, Complaint(f"a {kind} of nothing", f"as in `{kind}: [{{signal: attention}}, {{signal: recency}}]`")
    for key in STAGES:
        if key in scorer.model_fields_set:
            reason = f"`{key}` belongs to a signal, and a {kind} has none of its own"
            yield key, Complaint(reason, f"put it into the parts of the {kind}", (), "key")


def check_reading(scorer: Scorer) -> Iterator[tuple[str, Complaint]]:
    if scorer.memory.kind != "none":
        yield "memory", Complaint("reading looks at this pass alone and remembers nothing", "remove it", (), "key")
    if scorer.queries.kind == "last":
        yield "queries", Complaint("reading looks at this pass's query alone", "remove it", (), "key")


# Tests -----------------------------------------------------------------------------------------------------------


def check_tests(policy: Policy) -> Iterator[Placed]:
    """What a test sets must be a param, and its value readable."""
    scope = Scope({name: param.value for name, param in policy.params.items()}, pools=frozenset(policy.pools))
    for index, test in enumerate(policy.tests):
        for name, value in test.set.items():
            where: Path = ("tests", index, "set", name)
            if name not in policy.params:
                hint = nearest(name, policy.params) or "this policy has no params"
                yield where, Complaint(f"there is no param `{shown(name)}` to set", hint, (), "key")
                continue
            try:
                scope.resolve(str(value))
            except KnownMistake:
                continue
            except Complaint as complaint:
                yield where, complaint
