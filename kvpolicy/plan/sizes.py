"""How large a pool can become: capacities and bounds by interval arithmetic over rows and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from kvpolicy.language import Range
from kvpolicy.plan.structure import PoolPlan, admitted


@dataclass(frozen=True)
class Lengths:
    """The lengths a plan is made for: prompt tokens of a row (fewest when its first turn ends, most over all turns),
    generated tokens, prompt turns; over how many KV heads a budget may be shared out; and whether prompts are
    ``chunked``, so that updates meet the beginning of one, too."""

    prompt: tuple[int, int]
    generated: int
    turns: int = 1
    kv_heads: int = 1
    chunked: bool = False

    @property
    def fewest(self) -> int:
        """The fewest prompt tokens that a row has read at an update."""
        return min(1, self.prompt[0]) if self.chunked else self.prompt[0]

    def ranges(self) -> dict[str, Range]:
        """What the clocks in an expression may read, from the first update to the last generated token."""
        low, high = self.fewest, self.prompt[1]
        return {
            "t": Range(Fraction(0), Fraction(self.generated)),
            "prompt_len": Range(Fraction(low), Fraction(high)),
            "context": Range(Fraction(low), Fraction(high + self.generated)),
        }


def in_pages(tokens: int, page: int) -> int:
    """Tokens rounded up to whole pages."""
    return -(-tokens // page) * page


def size_pools(
    pools: tuple[PoolPlan, ...], order: tuple[int, ...], lengths: Lengths, *, full: bool = False
) -> tuple[PoolPlan, ...]:
    """Give every pool its capacity, bound, victims and first slot.

    Pools are sized in update ``order``, so that a budget which names another pool's size finds its range known.
    ``full`` asks for the sizes beside a prompt that fills its pool: then a pool without a budget has just one size.
    """
    fed = {pool.to for pool in pools}
    pools = tuple(replace(pool, fed=pool.name in fed) for pool in pools)
    ranges, sized = lengths.ranges(), list(pools)
    arrivals = _arrivals(pools, order, lengths)
    for pool in pools:  # of all, before any is sized: a budget may name what a later pool has seen
        seen = arrivals[pool.name] if pool.fed else _most(pool, lengths)
        ranges[f"seen({pool.name})"] = Range(Fraction(0), Fraction(seen))
    for index in order:
        pool = sized[index]
        ever = arrivals[pool.name]
        if pool.budget is None:
            pool = replace(pool, bound=ever, capacity=ever)
        else:
            special = ever if pool.fed else min(ever, _in_turns(lengths.prompt[1], pool.page, lengths))
            protected = _protected(pool, ranges, ever, special)
            bound = min(ever, max(_within_budget(pool, ranges, lengths), protected))
            slack = _slack(pool, lengths, sized)
            victims = _victims(pool, slack, sized)
            pool = replace(pool, bound=bound, capacity=min(ever, bound + slack), victims=victims)
            if _shares(pool, pool.name in fed):
                pool = replace(pool, shared=True, capacity=_of_all_heads(pool, ranges, lengths, ever, protected))
        fewest = pool.bound if full and pool.budget is None else _fewest(pool, pools, ranges, lengths)
        ranges[f"size({pool.name})"] = Range(Fraction(min(fewest, pool.bound)), Fraction(pool.bound))
        # A pool that nothing reaches at these lengths still gets one unit, so that no tensor is empty.
        sized[index] = replace(pool, capacity=max(pool.capacity, pool.page))
    offset = 0
    # Behind the slots with the model's own numbers lie stored ones, and apart from both those that heads share.
    for index, pool in sorted(enumerate(sized), key=lambda place: (place[1].shared, place[1].store is not None)):
        sized[index] = replace(pool, offset=offset, read_units=_read_units(pool, ranges))
        offset += pool.capacity
    return tuple(sized)


def _in_turns(tokens: int, page: int, lengths: Lengths) -> int:
    """The most whole-page tokens that so many make: every turn but the last may leave a page part full."""
    return in_pages(tokens, page) + (lengths.turns - 1) * (page if page > 1 else 0)


def _read_units(pool: PoolPlan, ranges: dict[str, Range]) -> int:
    """The most units that one pass reads beside the newest, which only what arrives from the text has."""
    if pool.read is None:
        return 0
    high = pool.read.top.bound(ranges).high
    most = pool.units if high == math.inf else -(-max(0, math.floor(high)) // pool.page)
    return min(pool.units, most if pool.fed else max(0, most - 1))


def _most(pool: PoolPlan, lengths: Lengths) -> int:
    return admitted(pool, lengths.prompt[1], lengths.generated)


def _arrivals(pools: tuple[PoolPlan, ...], order: tuple[int, ...], lengths: Lengths) -> dict[str, int]:
    """The most whole-page tokens that can ever enter each pool, from the text and from the pools that feed it."""
    ever = {pool.name: _in_turns(_most(pool, lengths), pool.page, lengths) for pool in pools}
    for index in order:  # sources come before the pools they feed
        source = pools[index]
        if source.to is not None:
            page = next(pool.page for pool in pools if pool.name == source.to)
            ever[source.to] += in_pages(ever[source.name], page)
    return ever


def _fewest(pool: PoolPlan, pools: tuple[PoolPlan, ...], ranges: dict[str, Range], lengths: Lengths) -> int:
    """The fewest whole-page tokens that an update can leave: the shortest prompt, or what the budget has room for.

    An update drops units only down to the budget, and between updates they only come; so what the first prompt brings
    and the least budget allows is there for ever.
    """
    others = frozenset().union(*(other.admits for other in pools)) - {"prompt", "generated"}
    if "prompt" not in pool.admits or others:  # special tokens and images may go to another pool
        return 0
    prompt = in_pages(lengths.fewest, pool.page)
    if pool.budget is None:
        return prompt
    if pool.scope == "across-heads":  # a head may lose what another wins
        return 0
    least = max(Fraction(0), pool.budget.bound(ranges).low)  # a budget may fall without limit: `8 - seen(other)`
    return min(prompt, math.floor(least) // pool.page * pool.page)


def _shares(pool: PoolPlan, fed: bool) -> bool:
    """Whether the KV heads share a pool's slots: heads win places from each other, and only when a prompt has ended,
    so that nothing has to find a place while tokens are generated."""
    return (
        pool.scope == "across-heads"
        and pool.cadence == 0
        and "generated" not in pool.admits
        and not fed
        and pool.to is None
        and pool.read is None
        and pool.store is None
    )


def _of_all_heads(pool: PoolPlan, ranges: dict[str, Range], lengths: Lengths, ever: int, protected: int) -> int:
    """The most whole-page tokens that all KV heads together keep: as many as if each had its own budget, and half a
    unit a head where shares of it are rounded."""
    most = max(_mean_budget(pool, ranges), protected)
    rounding = lengths.kv_heads // 2 * pool.page if 0 < pool.floor < 1 else 0
    return min(lengths.kv_heads * ever, lengths.kv_heads * most + rounding)


def _mean_budget(pool: PoolPlan, ranges: dict[str, Range]) -> int:
    """The most whole-page tokens that any value of the budget says."""
    assert pool.budget is not None
    return max(0, math.floor(pool.budget.bound(ranges).high)) // pool.page * pool.page


def _within_budget(pool: PoolPlan, ranges: dict[str, Range], lengths: Lengths) -> int:
    """The most whole-page tokens that any value of the budget allows one head."""
    most = _mean_budget(pool, ranges)
    if pool.scope == "across-heads":  # one head may win what all of them were given, but for the floor, rounded
        return in_pages(math.ceil((1 - pool.floor) * lengths.kv_heads * most + pool.floor * most), pool.page)
    return most


def _protected(pool: PoolPlan, ranges: dict[str, Range], ever: int, special: int) -> int:
    """The most whole-page tokens that may be safe from eviction at once; ``special`` of them by their trait."""
    if pool.pin_survivors:
        # Where nothing else is safe, survivors were within the budget once: no more of them than its greatest value.
        alone = pool.page == 1 and not pool.pin_special and pool.scope != "across-heads"
        return 0 if alone and pool.window is None and pool.first is None else ever
    tokens = special if pool.pin_special else 0
    for quantity in (pool.window, pool.first):
        if quantity is None:
            continue
        high = quantity.bound(ranges).high
        most = ever if high == math.inf else max(0, math.floor(high))
        # A run of tokens may begin and end inside a page, so it can touch one page more than it fills.
        tokens += most if pool.page == 1 or most == 0 else in_pages(most, pool.page) + pool.page
    return tokens + (pool.page if pool.page > 1 else 0)


def _slack(pool: PoolPlan, lengths: Lengths, pools: list[PoolPlan]) -> int:
    """Tokens that may arrive between two updates, whole pages. Prompt tokens wait in the turn's own workspace."""
    between = lengths.generated if pool.cadence == 0 else min(pool.cadence, max(1, lengths.generated))
    slack = in_pages(between, pool.page) if "generated" in pool.admits else 0
    for source in (other for other in pools if other.to == pool.name):
        if source.victims:
            updates = 0 if source.cadence == 0 else -(-between // source.cadence)
            slack += source.victims * source.page * updates
        else:  # at most what it holds and what it gets
            slack += in_pages(source.capacity + between, pool.page)
    return slack


def _rests(pool: PoolPlan, pools: list[PoolPlan]) -> bool:
    """Whether the size of a pool stays what it was at the end of the prompt until the next one ends."""
    if "generated" in pool.admits or any(other.to == pool.name for other in pools):
        return False
    limits = (pool.budget, pool.window, pool.first)
    return not pool.evicts or pool.cadence == 0 or all(limit is None or limit.constant is not None for limit in limits)


def _victims(pool: PoolPlan, slack: int, pools: list[PoolPlan]) -> int:
    """The most units one update of a generated pass may have to drop; 0 stands for any number.

    Where neither the budget nor what is protected can shrink, an update drops no more units than arrived or lost their
    protection since the last one.
    """
    limits = [quantity for quantity in (pool.budget, pool.window, pool.first) if quantity is not None]
    moving = {f"size({other.name})" for other in pools if not _rests(other, pools)}
    moving |= {f"seen({other.name})" for other in pools if "generated" in other.admits or other.fed}
    if any(limit.names & moving or limit.direction() not in ("constant", "up") for limit in limits):
        return 0
    if pool.page > 1 and pool.window is not None:
        return slack  # pages left part full by short turns leave a window faster than they fill
    return slack // pool.page
