"""How memory and time grow with a text, as plans tell: tokens held, and tokens read in a step, by prompt and answer.

Nothing is fitted to a run. A policy is planned for texts so long that every pool is as full as it ever gets: with a
long prompt, with a long answer, and with both. What a plan allots to a text twice as long, and what is left over, is
the law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from kvpolicy.language import Policy, Quantity, Range
from kvpolicy.plan.build import make_plan
from kvpolicy.plan.geometry import ModelGeometry
from kvpolicy.plan.signals import needs, scoring_leaves
from kvpolicy.plan.sizes import in_pages
from kvpolicy.plan.structure import LayerPlan, Plan, PoolPlan, ScorerPlan

TYPICAL = ModelGeometry("llama", layers=32, query_heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
"""The shape that laws are told for, where none is given: Llama-3.1-8B's."""

LONG = 2**13 * 3**2 * 5**2 * 7 * 11
"""Tokens of a text in which every pool is full. Common page sizes, cadences and shares divide it."""

SHORT = 2**7 * 3 * 5
"""Tokens of the other part of it; no less, for a policy may refuse an empty prompt or answer."""

FINEST = 100_000
"""The largest divisor in a law; what comes to less than a token in so many is the rounding of a page."""

Words = Callable[[PoolPlan, Plan], int]


@dataclass(frozen=True)
class Law:
    """Tokens that a text of P prompt tokens and N generated ones comes to at most, per row and KV head of a layer:
    ``prompt`` * P + ``generated`` * N + ``both`` * min(P, N) + ``constant``; a page more where pages are rounded."""

    prompt: Fraction = Fraction(0)
    generated: Fraction = Fraction(0)
    both: Fraction = Fraction(0)
    constant: int = 0

    def at(self, prompt: int, generated: int) -> int:
        """Tokens for a text, rounded up."""
        both = self.both * min(prompt, generated)
        return math.ceil(self.prompt * prompt + self.generated * generated + both + self.constant)

    @property
    def bounded(self) -> bool:
        """Whether it stays the same however long the text is."""
        return not (self.prompt or self.generated or self.both)

    def __str__(self) -> str:
        """``O(P + B)``: P prompt tokens, N generated ones, B what the params bound."""
        if self.prompt == self.generated != 0:
            terms = ["P + N" if self.prompt == 1 else _scaled("(P + N)", self.prompt)]
        else:
            terms = [_scaled(name, share) for name, share in (("P", self.prompt), ("N", self.generated)) if share]
        if self.both:
            terms.append(_scaled("min(P, N)", self.both))
        if self.constant > 1:  # the newest token alone, which waits for its step's update, is no budget
            terms.append("B")
        return f"O({' + '.join(terms) or '1'})"


def _scaled(name: str, share: Fraction) -> str:
    """`N`, `N/4`, `0.35 N`."""
    if share.numerator == 1:
        return name if share == 1 else f"{name}/{share.denominator}"
    return f"{float(share):.4g} {name}"


@dataclass(frozen=True)
class Part:
    """Layers or KV heads with one law. ``where`` is empty where that is all of them.

    memory: tokens held at most, those that wait for the next update included; ``stored`` is that by bits, None for the
    model's own precision. time: tokens read in a generated step: those attended to, and those looked at to choose them.
    """

    where: str
    pools: dict[str, Law]
    memory: Law
    stored: dict[int | None, Law]
    time: Law

    def __str__(self) -> str:
        """The memory law, apart for each precision."""
        if set(self.stored) == {None}:
            return str(self.memory)
        bits = sorted(self.stored.items(), key=lambda item: -(item[0] or 99))
        return " + ".join(f"{law} in {count} bits" if count else str(law) for count, law in bits)


def laws(policy: Policy, geometry: ModelGeometry = TYPICAL) -> list[Part]:
    """The laws of a policy, that of most layers and KV heads first.

    Raises:
        PolicyError: the policy cannot be resolved for this shape.
    """
    least = least_shape(policy, geometry)
    parts = _grouped(laws_by_head(policy, least))
    if len(parts) > 1 and least.layers < geometry.layers:  # shares that move from layer to layer: all of them are told
        parts = _grouped(laws_by_head(policy, replace(least, layers=geometry.layers)))
    return parts


def laws_by_head(policy: Policy, geometry: ModelGeometry) -> dict[tuple[int, int], Part]:
    """(layer, KV head) -> its laws; where the heads of a layer do not differ, its head 0 stands for all."""
    loose = policy.model_copy(update={"total": None})  # of a prompt that is refused, the rest is still a law
    texts = [
        (double * prompt, double * new) for prompt, new in ((LONG, 0), (0, LONG), (LONG, LONG)) for double in (1, 2)
    ]
    plans = [
        make_plan(loose, geometry, prompt=(1, prompt or SHORT), max_new_tokens=new or SHORT) for prompt, new in texts
    ]
    cells: dict[tuple[int, int], Part] = {}
    for layer in plans[0].layers:
        same = [plan.even(plan.layers[layer.index]) for plan in plans]
        for head in range(1 if layer.heads is None else geometry.kv_heads):
            cells[layer.index, head] = _part(policy, plans, [_pools(one, head) for one in same])
    return cells


def _pools(layer: LayerPlan, head: int) -> tuple[PoolPlan, ...]:
    return layer.pools if layer.heads is None else layer.heads[head]


def _part(policy: Policy, plans: list[Plan], pools: list[tuple[PoolPlan, ...]]) -> Part:
    """The laws of one KV head of one layer, from its pools in each of the plans."""

    def law(words: Words, of: Callable[[PoolPlan], bool] = lambda pool: True, most: bool = True) -> Law:
        counts = [
            sum(words(pool, plan) for pool in found if of(pool)) for plan, found in zip(plans, pools, strict=True)
        ]
        if policy.total is not None and most:
            counts = [
                min(count, _total(policy, plan, found)) for count, plan, found in zip(counts, plans, pools, strict=True)
            ]
        return _law(counts)

    def named(name: str) -> Callable[[PoolPlan], bool]:
        return lambda pool: pool.name == name

    def stored_in(bits: int | None) -> Callable[[PoolPlan], bool]:
        return lambda pool: _bits(pool) == bits

    return Part(
        where="",
        pools={pool.name: law(_held, named(pool.name), False) for pool in pools[0]},
        memory=law(_held),
        stored={bits: law(_held, stored_in(bits)) for bits in {_bits(pool) for pool in pools[0]}},
        time=law(_read),
    )


def _law(counts: list[int]) -> Law:
    """A law from what a long prompt, a long answer, and a text with both come to, each also twice as long."""
    prompt, generated, both = (
        max(Fraction(0), Fraction(twice - once, LONG)).limit_denominator(FINEST)
        for once, twice in zip(counts[::2], counts[1::2], strict=True)
    )
    joint = max(Fraction(0), both - prompt - generated)
    left = [
        counts[0] - prompt * LONG - (generated + joint) * SHORT,
        counts[2] - generated * LONG - (prompt + joint) * SHORT,
        counts[4] - (prompt + generated + joint) * LONG,
    ]
    return Law(prompt, generated, joint, max(0, math.ceil(max(left))))


def _total(policy: Policy, plan: Plan, pools: tuple[PoolPlan, ...]) -> int:
    """The most that all pools together hold where the policy says so, and what may wait for an update beside it."""
    assert policy.total is not None
    waits = sum(pool.capacity - pool.bound for pool in pools if pool.evicts)
    return _most(policy.total, plan, pools) + waits


def _held(pool: PoolPlan, plan: Plan) -> int:
    """Tokens of a pool at most: its slots, but for the one unit that a pool gets which nothing ever reaches."""
    return pool.capacity if pool.bound else 0


def _read(pool: PoolPlan, plan: Plan) -> int:
    """Tokens that a generated step reads of a pool, a box of a page's keys counting as one."""
    held = _held(pool, plan)
    if pool.read is None:
        return held + math.ceil(_looked_at(scoring_leaves(pool), pool, held, {"bounds"}) / max(1, pool.cadence))
    top = in_pages(_most(pool.read.top, plan, plan.layers[0].pools), pool.page) + pool.page
    looks = _looked_at(pool.read.scorer.leaves(), pool, held, {"bounds", "logits", "keys", "values"})
    return min(held, top) + looks


def _looked_at(leaves: Iterator[ScorerPlan], pool: PoolPlan, held: int, kinds: set[str]) -> int:
    """What scorers read of a pool beside what is attended to anyway."""
    found = set().union(*(needs(leaf.signal) for leaf in leaves)) & kinds
    if pool.page > 1 and found == {"bounds"}:
        return held // pool.page
    return held if found - ({"bounds"} if pool.page > 1 else set()) and pool.read is not None else 0


def _most(quantity: Quantity, plan: Plan, pools: tuple[PoolPlan, ...]) -> int:
    """The most that a quantity is worth at a plan's lengths."""
    (low, prompt), new = plan.prompt, plan.max_new_tokens
    ranges = {"t": Range(0, new), "prompt_len": Range(low, prompt), "context": Range(low, prompt + new)}
    for pool in pools:
        ranges[f"size({pool.name})"] = Range(0, pool.bound)
        ranges[f"seen({pool.name})"] = Range(0, max(pool.bound, prompt + new))
    known = {"layers": Fraction(len(plan.layers)), "max_new_tokens": Fraction(new)}
    high = quantity.fold(known).bound(ranges).high
    return prompt + new if high == math.inf else max(0, math.floor(high))


def _bits(pool: PoolPlan) -> int | None:
    return None if pool.store is None else pool.store.bits


def least_shape(policy: Policy, shape: ModelGeometry) -> ModelGeometry:
    """The least of a shape that shows whether layers and KV heads differ, and where an override says so all of them."""
    if any(override.heads is not None for override in policy.overrides):
        return shape
    layers = shape.layers if policy.overrides else min(shape.layers, 4)
    return replace(shape, layers=layers, query_heads=shape.group, kv_heads=1)


# Where ---------------------------------------------------------------------------------------------------------------


def _grouped(cells: dict[tuple[int, int], Part]) -> list[Part]:
    """One part for all that read alike, the largest first."""
    alike: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for cell, part in cells.items():
        words = (str(part), str(part.time), *(f"{name} {law}" for name, law in part.pools.items()))
        alike.setdefault(words, []).append(cell)
    by_size = sorted(alike.values(), key=lambda group: (-len(group), group))
    return [_widest(cells, group, "" if len(alike) == 1 else _where(group, cells)) for group in by_size]


def _widest(cells: dict[tuple[int, int], Part], group: list[tuple[int, int]], where: str) -> Part:
    """The part of a group that holds the most: laws that read alike may differ in what the params bound."""
    part = max((cells[cell] for cell in group), key=lambda part: part.memory.constant)
    return Part(where, part.pools, part.memory, part.stored, part.time)


def _where(group: list[tuple[int, int]], cells: dict[tuple[int, int], Part]) -> str:
    """`layers 0..1`, or how many KV heads where a layer's own differ."""
    layers = sorted({layer for layer, _ in group})
    if any(cell[0] in layers and cell not in group for cell in cells):
        heads = 1 + max(head for _, head in cells)
        own = {layer for layer, head in cells if head}  # a layer without heads of its own has one cell for all
        some = sum(1 if layer in own else heads for layer, _ in group)
        return f"{some} of {heads * len({layer for layer, _ in cells})} KV heads"
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs
    )
