"""Pools as lists of pages: who enters, what is stored in few bits, how heads share a budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kvpolicy.oracle.text import Array, Page
from kvpolicy.plan import LayerPlan, PoolPlan, StorePlan


@dataclass
class Pool:
    """One pool of one KV head; ``pages`` in order of arrival. ``fed``: another pool moves its units here."""

    plan: PoolPlan
    fed: bool
    pages: list[Page] = field(default_factory=list)
    open: bool = False
    seen: int = 0
    size: int = 0
    stored: set[tuple[str, int]] = field(default_factory=set)

    def enter(self, position: int, t: int) -> None:
        """Admit one token: into the open page, or into a new one."""
        if not self.open or not self.pages or len(self.pages[-1].positions) == self.plan.page:
            self.pages.append(Page(entered=t))
        self.open = True
        self.pages[-1].positions.append(position)
        self.pages[-1].ordinals.append(self.seen)
        self.seen += 1

    def positions(self) -> frozenset[int]:
        return tokens_of(self.pages)

    def protected(self, first: int, window: int, special: Sequence[bool]) -> Array:
        """Which pages are safe [pages] bool: a page is if any of its tokens is, and so is the newest (page > 1), unless
        another pool moves its units here."""
        if not self.pages:
            return np.zeros(0, dtype=bool)
        positions = np.array([position for page in self.pages for position in page.positions])
        places = np.array([ordinal for page in self.pages for ordinal in page.ordinals])
        arrived = self.seen
        if self.fed:
            places, arrived = np.argsort(np.argsort(positions)), len(positions)
        safe = (places < first) | (places >= arrived - window)
        if self.plan.pin_special:
            safe |= np.array(special)[positions]
        pages = np.logical_or.reduceat(safe, np.cumsum([0, *(len(page.positions) for page in self.pages[:-1])]))
        if self.plan.pin_survivors:
            pages |= np.array([page.survivor for page in self.pages])
        if self.plan.page > 1 and not self.fed:
            pages[-1] = True
        return pages

    def without_newest(self) -> Array:
        """Which pages are not the newest [pages] bool. What another pool moves here is complete: none is newest."""
        older = np.ones(len(self.pages), dtype=bool)
        older[-1:] = self.fed
        return older

    def take(self, gone: Collection[Page]) -> None:
        """Let these pages go."""
        ids = {id(page) for page in gone}
        self.pages = [page for page in self.pages if id(page) not in ids]

    def copy(self) -> Pool:
        return replace(self, pages=[page.copy() for page in self.pages], stored=set(self.stored))

    def receive(self, page: Page, t: int) -> None:
        """Take over a unit of another pool as it is, but for its memory. No page is open then."""
        places = list(range(self.seen, self.seen + len(page.positions)))
        self.pages.append(Page(t, list(page.positions), places))
        self.open = False
        self.seen += len(places)

    def store(self, what: str, vectors: Array) -> None:
        """Round the pool's "keys" or "values" among ``vectors`` [T, D] in place, a page once, when it is complete."""
        plan = self.plan.store
        if plan is None:
            return
        for page in self.pages:
            waits = self.open and page is self.pages[-1] and len(page.positions) < self.plan.page
            if not waits and (what, page.position) not in self.stored:
                by = plan.keys if what == "keys" else plan.values
                vectors[page.positions] = (rounded_tokens if by == "token" else rounded_channels)(
                    vectors[page.positions], plan
                )
                self.stored.add((what, page.position))


def tokens_of(pages: Sequence[Page]) -> frozenset[int]:
    return frozenset(position for page in pages for position in page.positions)


def rounded_tokens(vectors: Array, plan: StorePlan) -> Array:
    """A page [n, D] whose groups are neighbouring channels of one token."""
    return rounded_channels(vectors.T, plan).T


def rounded_channels(vectors: Array, plan: StorePlan) -> Array:
    """A page [n, D] whose groups are one channel of neighbouring tokens."""
    starts = range(0, len(vectors), plan.group)
    return np.concatenate([rounded(vectors[start : start + plan.group], plan.bits) for start in starts])


def rounded(numbers: Array, bits: int) -> Array:
    """To the nearest of 2^bits levels from the least to the greatest along the first axis.

    In float32, which is where a level is chosen: two roundings that part would be a whole step apart.
    """
    exact = numbers.astype(np.float32)
    low, high = exact.min(axis=0), exact.max(axis=0)
    step = (high - low) / np.float32(2**bits - 1)
    levels = np.rint((exact - low) / np.where(step > 0, step, np.float32(1)))
    return (low + levels * step).astype(float)


def new_pools(layer: LayerPlan, head: int) -> dict[str, Pool]:
    """The empty pools of one KV head, in reading order."""
    plans = layer.pools if layer.heads is None else layer.heads[head]
    fed = {plan.to for plan in plans}
    return {plan.name: Pool(plan, plan.name in fed) for plan in plans}


def update_order(plans: Sequence[PoolPlan]) -> list[str]:
    """Names of pools such that whatever feeds a pool, or is named in its quantities, is updated before it."""
    before: dict[str, set[str]] = {plan.name: set() for plan in plans}
    for plan in plans:
        if plan.to is not None:
            before[plan.to].add(plan.name)
        names = {name for _, quantity in plan.quantities() for name in quantity.names if name.startswith("size(")}
        before[plan.name] |= {name[len("size(") : -1] for name in names} - {plan.name}
    order: list[str] = []
    while len(order) < len(before):
        order.append(next(name for name in before if name not in order and before[name] <= set(order)))
    return order


def share_out(
    pools: Mapping[int, Pool], safe: Mapping[int, Array], scores: Mapping[int, Array], room: Mapping[int, int]
) -> dict[int, int]:
    """Ada-KV: how many candidates stay in each head, when all heads' candidates compete for all heads' room (4.8)."""
    ranking = sorted(
        (float(scores[head][index]), page.position, head)
        for head, pool in pools.items()
        for index, page in enumerate(pool.pages)
        if not safe[head][index]
    )
    winners = [head for _, _, head in ranking[max(0, len(ranking) - sum(room.values())) :]]
    stay = {}
    for head, pool in pools.items():
        mixed = (1 - pool.plan.floor) * winners.count(head) + pool.plan.floor * room[head]
        stay[head] = int((2 * mixed + 1) // 2)  # round half up
    return stay
