"""What a policy does to a text, KV head by KV head: which tokens it holds when, and what the others would have been.

The oracle runs; no torch. A *moment* is a pass after its update: the end of the prompt, or of each of its chunks, and
then every generated token. A token is *wanted* at a moment where the full cache would pay it more than ``WANTED`` times
an even share of the attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvpolicy.errors import UsageError
from kvpolicy.language import Policy
from kvpolicy.plan import Plan
from kvpolicy.testing.feeding import OracleAlone, plan_for, watch
from kvpolicy.testing.patterns import Attention
from kvpolicy.testing.seen import Seen

Array = np.ndarray

WANTED = 3.0
"""How many times an even share of the attention makes a token wanted."""

UNSAID, GONE = 0, 1
"""States of a token that no pool holds; see ``held``."""

KEPT, MISSED = 1, 2
"""Of a wanted token: attended in this pass, or not."""


def held(pool: int, safe: bool) -> int:
    """The state of a token in pool number ``pool``; ``safe``: no update could have dropped it at that moment."""
    return 2 + 2 * pool + safe


@dataclass(frozen=True)
class Runs:
    """Stretches of time: what ``token`` [N] was (``state`` [N]) from moment ``start`` [N] to before ``stop`` [N]."""

    token: Array
    start: Array
    stop: Array
    state: Array

    def at(self, moment: int, length: int) -> Array:
        """The state of each of ``length`` tokens at a moment; 0 where no stretch covers it."""
        states = np.zeros(length, dtype=int)
        now = (self.start <= moment) & (moment < self.stop)
        states[self.token[now]] = self.state[now]
        return states

    def within(self, first: int, last: int) -> Runs:
        """The stretches that touch the moments first..last."""
        return self.where((self.start <= last) & (first < self.stop))

    def where(self, chosen: Array) -> Runs:
        return Runs(self.token[chosen], self.start[chosen], self.stop[chosen], self.state[chosen])


@dataclass(frozen=True)
class Loss:
    """Neighbours that were evicted, and wanted at a moment at which the first of them was.

    ``left``: the first and the last t at which they went; ``wanted``: the t at which one of them was next wanted;
    ``times``: at how many moments one of them was; ``cost``: the share of all the attention of generated tokens that
    the full cache would have paid them after they had left.
    """

    tokens: tuple[int, ...]
    left: tuple[int, int]
    wanted: int
    times: int
    cost: float


@dataclass(frozen=True)
class Course:
    """One KV head over the M moments of a text of T tokens.

    Attributes:
        pools: names, in reading order; ``bounds``: the most tokens each may keep.
        newest, t: position of the newest token, and the clock [M]. generated: whether the pass brought a generated one.
        resident: tokens in each pool after the pass [P, M]. budget: what its last update allowed, NaN before [P, M].
        mass: the share of the full cache's attention that was attended [M].
        evicted: tokens that left in the pass [M]. updated: whether a pool with a budget was updated [M].
        states: of all tokens said. wanted: of those wanted, ``KEPT`` or ``MISSED``.
        losses: what was evicted and wanted later, the dearest first.
    """

    layer: int
    row: int
    head: int
    prompt: int
    length: int
    pools: tuple[str, ...]
    bounds: tuple[int, ...]
    newest: Array
    t: Array
    generated: Array
    resident: Array
    budget: Array
    mass: Array
    evicted: Array
    updated: Array
    states: Runs
    wanted: Runs
    losses: tuple[Loss, ...]

    @property
    def counted(self) -> Array:
        """The moments that averages are over: those of generated tokens, if there are any [M] bool."""
        return self.generated if self.generated.any() else np.ones(len(self.t), dtype=bool)

    @cached_property
    def mean_mass(self) -> float:
        return float(self.mass[self.counted].mean())

    @cached_property
    def worst(self) -> int:
        """The moment at which the least mass was kept."""
        return int(np.argmin(np.where(self.counted, self.mass, np.inf)))

    @property
    def min_mass(self) -> float:
        return float(self.mass[self.worst])

    @property
    def highest(self) -> int:
        """The most tokens that are held at any moment, or allowed by budgets, pools one upon the other."""
        held = np.cumsum(self.resident, axis=0)
        allowed = held - self.resident + np.nan_to_num(self.budget)
        return max(1, int(held.max()), int(allowed.max()))

    @property
    def never_wanted(self) -> float:
        """The share of attention lost with tokens that were never wanted by themselves."""
        return max(0.0, 1 - self.mean_mass - sum(loss.cost for loss in self.losses))


@dataclass(frozen=True)
class Simulation:
    """A policy's courses: every KV head of every row and layer that was asked for, the one to be shown first."""

    label: str
    policy: Policy
    plan: Plan
    courses: tuple[Course, ...]

    @property
    def shown(self) -> Course:
        return self.courses[0]

    @property
    def mean_mass(self) -> float:
        return float(np.mean([course.mean_mass for course in self.courses]))

    @property
    def min_mass(self) -> float:
        return self.worst.min_mass

    @property
    def worst(self) -> Course:
        """The course with the least mass at any moment."""
        return min(self.courses, key=lambda course: course.min_mass)

    @property
    def evicted(self) -> int:
        """Tokens that left, over all courses."""
        return sum(int(course.evicted.sum()) for course in self.courses)

    @property
    def updates(self) -> int:
        """Passes that updated a pool with a budget, over all courses."""
        return sum(int(course.updated.sum()) for course in self.courses)


def simulate(
    policy: Policy,
    said: Attention,
    *,
    label: str = "",
    layer: int | None = None,
    row: int | None = None,
    head: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Feed a text to a policy.

    Args:
        label: how the policy is called in pictures; its name unless said.
        layer, row, head: only this layer, row and KV head; all of them by default. Negative counts from the end.
        progress: told the newest t and how many there are, once a pass.

    Raises:
        UsageError, PolicyError: there is no such place, or no plan of this policy for this text.
    """
    shape = said.geometry
    asked = tuple(
        _place(name, number, count)
        for name, number, count in (
            ("layer", layer, shape.layers),
            ("row", row, said.rows),
            ("head", head, shape.kv_heads),
        )
    )
    plan = plan_for(policy, said)
    writers: dict[tuple[int, int, int], _Writer] = {}
    for seen in watch(OracleAlone(plan, None if asked[0] is None else [asked[0]]), said):
        if any(number not in (None, at) for number, at in zip(asked, seen.place, strict=True)):
            continue
        if seen.place not in writers:
            writers[seen.place] = _Writer(seen, said.prompts[seen.step.row])
        writers[seen.place].note(seen)
        if progress is not None:
            progress(seen.step.t, said.steps)
    courses = tuple(writers[place].course() for place in sorted(writers))
    return Simulation(label or policy.name, policy, plan, courses)


def _place(name: str, number: int | None, count: int) -> int | None:
    if number is not None and not -count <= number < count:
        raise UsageError(f"--{name} {number}: this text has {name}s 0..{count - 1}")
    return None if number is None else number % count


class _Writer:
    """Writes one course down, pass by pass."""

    def __init__(self, seen: Seen, prompt: int) -> None:
        self.layer, self.row, self.head = seen.place
        self.prompt, self.length = prompt, seen.last + 1
        self.plans = seen.plans
        self.newest: list[int] = []
        self.t: list[int] = []
        self.generated: list[bool] = []
        self.resident: list[list[int]] = []
        self.budget: list[list[float]] = []
        self.mass: list[float] = []
        self.evicted: list[int] = []
        self.updated: list[bool] = []
        self.states, self.wanted = _Stretches(self.length), _Stretches(self.length)
        self.missed = np.zeros(self.length)  # attention that each token would have had, summed over generated tokens
        self.left = np.full(self.length, -1)  # moment at which it went

    def note(self, seen: Seen) -> None:
        if seen.newest < 0 or (self.newest and seen.newest == self.newest[-1]):
            return  # a chunk that brings nothing to this row
        moment, step = len(self.newest), seen.step
        pools = [step.heads[self.head][name] for name in self.plans]
        before = self.budget[-1] if self.budget else [np.nan] * len(pools)
        self.newest.append(seen.newest)
        self.t.append(step.t)
        self.generated.append(step.kind == "generated")
        self.resident.append([len(pool.kept) for pool in pools])
        self.budget.append(
            [pool.choice.budget if pool.choice else old for pool, old in zip(pools, before, strict=True)]
        )
        self.updated.append(seen.updated())

        states = np.where(np.arange(self.length) <= seen.newest, GONE, UNSAID)
        for number, (plan, pool) in enumerate(zip(self.plans.values(), pools, strict=True)):
            states[list(pool.kept)] = held(number, not plan.evicts)
            states[list(pool.protected)] = held(number, True)
        left = (states == GONE) & (self.left < 0)
        self.left[left] = moment
        self.evicted.append(int(left.sum()))
        self.states.note(moment, states)

        attention = seen.full.probabilities(self.layer, self.row, self.head, seen.newest)
        attended = np.zeros(self.length, dtype=bool)
        attended[list(seen.attended())] = True
        said = seen.newest + 1
        self.mass.append(max(0.0, 1 - float(attention[~attended[:said]].sum())))
        wanted = np.zeros(self.length, dtype=int)
        wanted[:said] = np.where(attention > WANTED / said, np.where(attended[:said], KEPT, MISSED), 0)
        self.wanted.note(moment, wanted)
        if self.generated[-1]:
            self.missed[:said] += np.where(attended[:said], 0.0, attention)

    def course(self) -> Course:
        moments = len(self.newest)
        wanted, t = self.wanted.runs(moments), np.array(self.t)
        return Course(
            layer=self.layer,
            row=self.row,
            head=self.head,
            prompt=self.prompt,
            length=self.length,
            pools=tuple(self.plans),
            bounds=tuple(plan.bound for plan in self.plans.values()),
            newest=np.array(self.newest),
            t=t,
            generated=np.array(self.generated),
            resident=np.array(self.resident).T,
            budget=np.array(self.budget, dtype=float).T,
            mass=np.array(self.mass),
            evicted=np.array(self.evicted),
            updated=np.array(self.updated),
            states=self.states.runs(moments),
            wanted=wanted,
            losses=self._losses(wanted.where(wanted.state == MISSED), t),
        )

    def _losses(self, missed: Runs, t: Array) -> tuple[Loss, ...]:
        """Neighbours that were missed at a moment at which the first of them was, together."""
        first: dict[int, int] = {}
        times: dict[int, set[int]] = {}
        for token, start, stop in zip(missed.token.tolist(), missed.start.tolist(), missed.stop.tolist(), strict=True):
            first[token] = min(start, first.get(token, start))
            times.setdefault(token, set()).update(range(start, stop))
        groups: list[list[int]] = []
        for token in sorted(first):
            if groups and token == groups[-1][-1] + 1 and times[token] & times[groups[-1][0]]:
                groups[-1].append(token)
            else:
                groups.append([token])
        generated = max(1, sum(self.generated))
        found = [
            Loss(
                tokens=tuple(group),
                left=(int(t[self.left[group].min()]), int(t[self.left[group].max()])),
                wanted=int(t[min(first[token] for token in group)]),
                times=len(set().union(*(times[token] for token in group))),
                cost=float(self.missed[group].sum()) / generated,
            )
            for group in groups
        ]
        return tuple(sorted(found, key=lambda loss: (-loss.cost, loss.tokens)))


class _Stretches:
    """Collects runs: each moment's states of all tokens are told, and only what changes is written down."""

    def __init__(self, length: int) -> None:
        self.now = np.zeros(length, dtype=int)
        self.since = np.zeros(length, dtype=int)
        self.ended: list[Array] = []

    def note(self, moment: int, states: Array) -> None:
        self._end(np.flatnonzero(states != self.now), moment)
        self.now = states

    def _end(self, tokens: Array, moment: int) -> None:
        told = tokens[self.now[tokens] > 0]
        self.ended.append(np.stack([told, self.since[told], np.full(len(told), moment), self.now[told]]))
        self.since[tokens] = moment

    def runs(self, moments: int) -> Runs:
        self._end(np.arange(len(self.now)), moments)
        columns = np.concatenate(self.ended, axis=1)
        token, start, stop, state = columns[:, np.lexsort((columns[1], columns[0]))]
        return Runs(token, start, stop, state)
