"""Policy + geometry + lengths -> Plan. Everything that can be refused is refused here, before a model is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.language import Policy, Quantity, QuantityError, Range
from kvpolicy.language.base import Complaint
from kvpolicy.language.policy import Pool, Scorer
from kvpolicy.language.signals import definition
from kvpolicy.plan.buffers import clock_buffers, layer_buffers, local_plans
from kvpolicy.plan.geometry import ModelGeometry
from kvpolicy.plan.sizes import Lengths, size_pools
from kvpolicy.plan.structure import (
    TRAITS,
    LayerPlan,
    Plan,
    PoolPlan,
    ReadPlan,
    ScorerPlan,
    StorePlan,
    Stream,
    pins_special,
)

Known = Mapping[str, Fraction]
Path = tuple[str | int, ...]  # keys and indices from the top of a policy's text


def make_plan(
    policy: Policy,
    geometry: ModelGeometry,
    *,
    batch: int = 1,
    prompt: int | tuple[int, int],
    max_new_tokens: int,
    turns: int = 1,
) -> Plan:
    """Resolve a policy for one model shape and one range of lengths.

    Args:
        batch: rows B of the cache.
        prompt: (the fewest that a row has read when its first turn ends, the most over all its turns), or one number:
            exactly so many, or, with several turns, at most so many.
        max_new_tokens: generated tokens of a row, over all turns.
        turns: prompt turns the cache will see.

    Raises:
        PolicyError: the policy cannot be resolved for this shape.
        UsageError: lengths that make no sense, or that the policy's ``total`` cannot hold.
    """
    low, high = (prompt if turns == 1 else min(prompt, 0), prompt) if isinstance(prompt, int) else prompt
    if batch < 1 or low < 0 or high < low or max_new_tokens < 0 or turns < 1:
        raise UsageError(
            "a plan needs batch >= 1, turns >= 1, 0 <= fewest <= most prompt tokens and max_new_tokens >= 0; "
            f"got batch {batch}, turns {turns}, prompt {low}..{high}, max_new_tokens {max_new_tokens}"
        )
    chunk = _prompt_chunk(policy, geometry, max_new_tokens)
    lengths = Lengths((low, high), max_new_tokens, turns, geometry.kv_heads, chunk is not None)
    layers = [_plan_layer(policy, geometry, index, lengths) for index in range(geometry.layers)]
    streams = _streams(layers)
    layers = [_number_streams(layer, streams) for layer in layers]
    layers = [_allocated(layer, geometry, batch) for layer in layers]
    plan = Plan(
        policy=policy,
        geometry=geometry,
        batch=batch,
        prompt=(low, high),
        max_new_tokens=max_new_tokens,
        turns=turns,
        layers=tuple(layers),
        streams=streams,
        clocks=clock_buffers(streams, batch, high + max_new_tokens if pins_special(layers) else 0),
        prompt_chunk=chunk,
        local=local_plans(geometry, batch, high + max_new_tokens),
    )
    _check_total(plan, lengths)
    return plan


def _prompt_chunk(policy: Policy, geometry: ModelGeometry, generated: int) -> int | None:
    if policy.prompt_chunk is None:
        return None
    known = {"layers": Fraction(geometry.layers), "max_new_tokens": Fraction(generated)}
    return _whole(policy, policy.prompt_chunk, known, ("prompt_chunk",), 1)


def _plan_layer(policy: Policy, geometry: ModelGeometry, index: int, lengths: Lengths) -> LayerPlan:
    known = {
        "layer": Fraction(index),
        "layers": Fraction(geometry.layers),
        "max_new_tokens": Fraction(lengths.generated),
    }
    per_head = [policy.pools_for(index, geometry.layers, head) for head in range(geometry.kv_heads)]
    resolved = [_layer_pools(policy, pools, known, lengths) for pools in per_head]
    compact, groups = policy.positions == "compact", []
    for pools, order in dict.fromkeys(resolved):
        for pool in pools:
            if pool.store is not None and geometry.head_dim * pool.store.bits % 8:
                reason = f"{pool.store.bits} bits do not fill whole bytes where heads have {geometry.head_dim} channels"
                raise _refusal(policy, ("pools", pool.name, "store", "bits"), reason, "store more bits")
        members = tuple(head for head, other in enumerate(resolved) if other == (pools, order))
        dense = per_head[members[0]] is None
        groups.append(LayerPlan(index, dense, pools, order, members=members, compact=compact))
    if len(groups) == 1:
        return replace(groups[0], members=())
    _check_one_set(policy, groups)
    largest = max(groups, key=lambda group: group.slots)
    return replace(largest, dense=False, members=(), groups=tuple(groups), heads=tuple(pools for pools, _ in resolved))


def _check_one_set(policy: Policy, groups: list[LayerPlan]) -> None:
    """Refuse one set for all heads of a layer where these have different pools to choose it from."""
    deciding = [pool for group in groups for pool in group.pools if pool.evicts and pool.scope == "layer"]
    for pool in deciding:
        if sum(other.name == pool.name for other in deciding) > 1:
            reason = f"`{pool.name}` keeps one set for all heads, but an override gives some of them other answers"
            hint = "leave `scope` out, or override whole layers"
            raise _refusal(policy, ("pools", pool.name, "evict", "scope"), reason, hint)


def _layer_pools(
    policy: Policy, pools: dict[str, Pool] | None, known: Known, lengths: Lengths
) -> tuple[tuple[PoolPlan, ...], tuple[int, ...]]:
    if pools is None:
        planned: tuple[PoolPlan, ...] = (DENSE,)
    else:
        planned = _effective(tuple(_plan_pool(policy, name, pool, known) for name, pool in pools.items()))
    order = _update_order(planned)
    for pool in planned:
        _check_pages(policy, pool, planned)
        _check_quantities(policy, pool, planned, lengths)
    return size_pools(planned, order, lengths), order


def _check_pages(policy: Policy, pool: PoolPlan, pools: tuple[PoolPlan, ...]) -> None:
    """Refuse pages that units cannot move between, or that groups do not fit: they may depend on the layer."""
    page = next((other.page for other in pools if other.name == pool.to), pool.page)
    if page != pool.page:
        reason = f"units move whole, and `{pool.name}` has pages of {pool.page}, `{pool.to}` of {page}"
        raise _refusal(policy, ("pools", pool.name, "evict", "to"), reason, "give both pools the same `page`")
    store = pool.store
    if store is not None and "channel" in (store.keys, store.values) and pool.page % store.group:
        reason = f"groups by channel run along a page, and {store.group} tokens do not fit a page of {pool.page}"
        raise _refusal(policy, ("pools", pool.name, "store", "group"), reason, "make `page` a multiple of `group`")


def _check_quantities(policy: Policy, pool: PoolPlan, pools: tuple[PoolPlan, ...], lengths: Lengths) -> None:
    """Refuse an expression that may divide by zero, and a budget that nothing bounds, at these lengths."""
    ranges = lengths.ranges()
    for other in pools:
        ranges[f"seen({other.name})"] = ranges[f"size({other.name})"] = Range(Fraction(0), Fraction(10**9))
    for key, quantity in pool.quantities():
        try:
            high = quantity.bound(ranges).high
        except QuantityError as error:
            hint = error.hint or f"lengths: prompt {lengths.prompt[0]}..{lengths.prompt[1]}, t 0..{lengths.generated}"
            raise _refusal(policy, ("pools", pool.name, *key), f"`{quantity.text}`: {error.reason}", hint) from None
        if key == ("budget",) and high == math.inf:
            raise _refusal(policy, ("pools", pool.name, "budget"), f"nothing bounds `{quantity.text}`")


def _effective(pools: tuple[PoolPlan, ...]) -> tuple[PoolPlan, ...]:
    """Pools are read top-down: what an earlier one admits never reaches a later one."""
    taken: frozenset[str] = frozenset()
    left = []
    for pool in pools:
        pool = replace(pool, admits=pool.admits - taken - (TRAITS if "prompt" in taken else frozenset()))
        left.append(replace(pool, above=taken & TRAITS if pool.hears_prompts else frozenset()))
        taken |= pool.admits
    return tuple(left)


def _plan_pool(policy: Policy, name: str, pool: Pool, known: Known) -> PoolPlan:
    first = next((pin.count for pin in pool.pinned if pin.kind == "first"), None)
    pins = {pin.kind for pin in pool.pinned}
    every = 0
    if pool.update.kind != "prompt-end":
        every = _whole(policy, pool.update.every, known, ("pools", name, "update", "every"), 1)
    return PoolPlan(
        name=name,
        admits=pool.admits,
        page=_whole(policy, pool.page, known, ("pools", name, "page"), 1),
        budget=_fold(pool.budget, known),
        window=_fold(pool.window, known),
        first=_fold(first, known),
        pin_special="special" in pins,
        pin_survivors="survivors" in pins,
        scorer=_plan_scorer(policy, pool.scorer, known, ("pools", name, "scorer")) if pool.scorer else ScorerPlan(),
        scope=pool.evict.scope,
        floor=_number(policy, pool.evict.floor, known, ("pools", name, "evict", "floor")),
        to=pool.evict.to,
        cadence=every,
        read=ReadPlan(
            pool.read.top.fold(known), _plan_scorer(policy, pool.read.scorer, known, ("pools", name, "read", "scorer"))
        )
        if pool.read
        else None,
        store=_plan_store(policy, pool, known, name),
    )


def _plan_store(policy: Policy, pool: Pool, known: Known, name: str) -> StorePlan | None:
    if pool.store is None:
        return None
    return StorePlan(
        bits=_whole(policy, pool.store.bits, known, ("pools", name, "store", "bits"), 1),
        group=_whole(policy, pool.store.group, known, ("pools", name, "store", "group"), 1),
        keys=pool.store.keys,
        values=pool.store.values,
    )


def _plan_scorer(policy: Policy, scorer: Scorer, known: Known, where: Path) -> ScorerPlan:
    weight = _number(policy, scorer.weight, known, (*where, "weight"))
    for op, parts in (("sum", scorer.sum), ("product", scorer.product)):
        if parts is not None:
            planned = (_plan_scorer(policy, part, known, (*where, op, n)) for n, part in enumerate(parts))
            return ScorerPlan(op=op, weight=weight, parts=tuple(planned))
    assert scorer.signal is not None
    args = tuple(
        (key, _argument(policy, scorer.signal.name, key, value, known, where))
        for key, value in sorted(scorer.signal.args.items())
    )
    queries: str | int = scorer.queries.kind
    if scorer.queries.kind == "last":
        assert scorer.queries.last is not None
        queries = _whole(policy, scorer.queries.last, known, (*where, "queries", "last"), 1)
    hit: tuple[str, Quantity] | tuple[str, Fraction] | None = None
    if scorer.hit is not None and scorer.hit.kind == "top":
        hit = ("top", scorer.hit.value.fold(known))
    elif scorer.hit is not None:
        hit = ("above", _number(policy, scorer.hit.value, known, (*where, "hit", "above")))
    smooth = scorer.smooth and (scorer.smooth.kind, _whole(policy, scorer.smooth.width, known, (*where, "smooth"), 1))
    value = scorer.memory.value
    memory = (scorer.memory.kind, None if value is None else _number(policy, value, known, (*where, "memory")))
    return ScorerPlan(
        weight=weight,
        signal=scorer.signal.name,
        args=args,
        queries=queries,
        over=scorer.over,
        heads=scorer.heads,
        smooth=smooth or None,
        norm=scorer.norm,
        hit=hit,
        memory=memory,
    )


def _argument(policy: Policy, signal: str, key: str, value: object, known: Known, where: Path) -> object:
    """An argument as recipes get it: an int, a float or a word."""
    if not isinstance(value, Quantity):
        return value
    number, least = _number(policy, value, known, where), definition(signal).arguments[key].least
    if least is not None and number < least:
        reason = f"`{key}` of `{signal}` is {float(number):g} in layer {known['layer']}; the least is {float(least):g}"
        raise _refusal(policy, where, reason)
    return number.numerator if number.denominator == 1 else float(number)


def _fold(quantity: Quantity | None, known: Known) -> Quantity | None:
    return None if quantity is None else quantity.fold(known)


def _number(policy: Policy, quantity: Quantity, known: Known, where: Path) -> Fraction:
    folded = quantity.fold(known)
    if folded.constant is None:
        waits = ", ".join(sorted(folded.names))
        raise _refusal(policy, where, f"`{quantity.text}` must be known before the run, and it depends on {waits}")
    return folded.constant


def _whole(policy: Policy, quantity: Quantity, known: Known, where: Path, least: int) -> int:
    number = _number(policy, quantity, known, where)
    whole = number.numerator // number.denominator
    if whole < least:
        place = f" in layer {known['layer']}" if "layer" in known else ""
        raise _refusal(policy, where, f"`{quantity.text}` is {whole}{place}; the least is {least}")
    return whole


def _refusal(policy: Policy, where: Path, reason: str, hint: str = "") -> PolicyError:
    """An error that points into the policy's text."""
    return PolicyError(diagnostics=[policy.diagnostic(where, Complaint(reason, hint))])


def _update_order(pools: tuple[PoolPlan, ...]) -> tuple[int, ...]:
    """Pools whose size() a budget reads, and pools that feed another, are updated first; else reading order."""
    names = [pool.name for pool in pools]
    before: dict[str, set[str]] = {pool.name: set() for pool in pools}
    for pool in pools:
        for _, quantity in pool.quantities():
            sizes = {name[5:-1] for name in quantity.names if name.startswith("size(")}
            before[pool.name] |= sizes - {pool.name}
        if pool.to is not None:
            before[pool.to].add(pool.name)
    order: list[str] = []
    while len(order) < len(names):
        ready = [name for name in names if name not in order and before[name] <= set(order)]
        if not ready:
            raise PolicyError(f"pools {', '.join(n for n in names if n not in order)} wait for one another's size")
        order.append(ready[0])
    return tuple(names.index(name) for name in order)


def _streams(layers: list[LayerPlan]) -> tuple[Stream, ...]:
    found: dict[Stream, None] = {}
    for layer in layers:
        for pool in layer.every_pool:
            found.setdefault(pool.order_of_arrival)
    return tuple(found)


def _number_streams(layer: LayerPlan, streams: tuple[Stream, ...]) -> LayerPlan:
    sizes = {
        name[5:-1] for pool in layer.pools for _, q in pool.quantities() for name in q.names if name.startswith("size(")
    }
    pools = tuple(
        replace(pool, stream=streams.index(pool.order_of_arrival), size_read=pool.name in sizes) for pool in layer.pools
    )
    groups = tuple(_number_streams(group, streams) for group in layer.groups)
    of = {head: group.pools for group in groups for head in group.members}
    return replace(layer, pools=pools, groups=groups, heads=tuple(of[head] for head in sorted(of)) or None)


def _allocated(layer: LayerPlan, geometry: ModelGeometry, batch: int) -> LayerPlan:
    """The layer with its buffers; those of a group carry the numbers of its heads in their names."""
    groups = tuple(
        replace(group, buffers=layer_buffers(group, geometry.of_heads(len(group.members)), batch))
        for group in layer.groups
    )
    parts = [
        replace(buffer, name=f"heads {', '.join(map(str, group.members))}/{buffer.name}")
        for group in groups
        for buffer in group.buffers
    ]
    return replace(layer, groups=groups, buffers=tuple(parts) or layer_buffers(layer, geometry, batch))


def _check_total(plan: Plan, lengths: Lengths) -> None:
    """Refuse a prompt with which the pools cannot stay within the policy's ``total``."""
    if plan.policy.total is None:
        return
    high = lengths.prompt[1]
    longest = replace(lengths, prompt=(high, high), chunked=False)
    for layer in plan.layers:
        known = {"layer": Fraction(layer.index), "layers": Fraction(plan.geometry.layers)}
        known["max_new_tokens"] = Fraction(lengths.generated)
        total = plan.policy.total.fold(known).bound(longest.ranges()).low
        pools = size_pools(layer.pools, layer.order, longest, full=True)
        needed = sum(pool.bound for pool in pools)
        if needed > total and not layer.dense:
            parts = ", ".join(f"{pool.name} {pool.bound}" for pool in pools)
            raise UsageError(
                f"{plan.policy.name} keeps at most {int(total)} tokens in all, but with a prompt of {high} tokens it "
                f"needs {needed} ({parts}); raise the budget to {needed} or more, or shorten the prompt"
            )


DENSE = PoolPlan(
    name="all",
    admits=frozenset({"prompt", "generated"}),
    page=1,
    budget=None,
    window=None,
    first=None,
    pin_special=False,
    pin_survivors=False,
    scorer=ScorerPlan(),
    scope="kv-head",
    floor=Fraction(0),
    to=None,
    cadence=1,
    read=None,
    store=None,
)
