"""Settings to try: drawn by a seed, and brought to a memory by scaling all sizes of the policy together. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from kvpolicy.lab.tune.sizing import Settings, Sized, Sizer
from kvpolicy.lab.tune.space import Axis, Space
from kvpolicy.language import Policy, Quantity

SPREAD = 4.0
"""A drawn size is at most so many times larger or smaller, against the others, than the policy's defaults say."""

OLD = 0.5
"""How often a param that is drawn keeps its default: defaults are what somebody chose."""

DRAWS = 12
"""How often a trial is drawn anew before it is given up, where what was drawn makes no sense together."""

HALVINGS = 20
"""Of the range of factors, in search of a memory."""

CLOSE = 0.99
"""The share of a memory at which nothing more is looked for."""


@dataclass(frozen=True)
class Draw:
    """What chance chose: ``values`` of params that are no sizes, where these are not the defaults, and by how much each
    size is larger than the defaults say, before all of them are scaled."""

    values: Mapping[str, Fraction] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """Settings that come to a memory. ``number``: of the trial, in the order of drawing."""

    number: int
    draw: Draw
    settings: Settings
    sized: Sized

    @property
    def policy(self) -> Policy:
        return self.sized.policy

    @property
    def bytes(self) -> int:
        return self.sized.bytes


class Drawer:
    """Draws candidates; equal seeds give equal ones."""

    def __init__(self, space: Space, sizer: Sizer, seed: int) -> None:
        self.space, self.sizer, self.rng = space, sizer, random.Random(f"kvpolicy tune {seed}")
        self._seen: set[str] = set()
        self._lean: Draw | None = None
        self._count = 0

    def as_it_is(self) -> Candidate | None:
        """The policy with its own defaults, and what the user set."""
        return self._candidate(Draw(), dict(self.space.given))

    def proportions(self, target: int) -> Candidate | None:
        """Its own defaults in their own proportions, scaled to ``target`` bytes."""
        return self._fitted(Draw(), target)

    def drawn(self, target: int, near: Sequence[Candidate] = ()) -> Candidate | None:
        """One of at most ``target`` bytes, as near to that as sizes allow; near one of those given, if any are.

        None where ``DRAWS`` draws gave nothing new that fits.
        """
        for attempt in range(DRAWS):
            if near:
                draw = self._beside(self.rng.choice(near).draw)
            elif self._lean is not None and attempt >= DRAWS / 2:
                draw = self._beside(self._lean)  # little memory may need what chance seldom draws together
            else:
                draw = self._anywhere()
            found = self._fitted(draw, target)
            if found is not None:
                return found
        return None

    def least(self) -> Candidate:
        """What takes the least memory: of each param that is no size, one after the other, whichever of a few values
        allows the smallest sizes, and then each size as small as the policy runs with.

        Raises:
            AssertionError: nothing runs at all, which the space has made sure of.
        """
        best, draw = self._leanest(Draw(), None), Draw()
        for axis in self.space.others:
            for value in {axis.values[0], axis.values[len(axis.values) // 2], axis.values[-1]}:
                other = Draw({**draw.values, axis.name: value})
                found = self._leanest(other, best)
                if found is not best:
                    best, draw = found, other
        assert best is not None, self.sizer.refusal
        self._lean = draw
        return Candidate(-1, draw, *self._shrunk(best))

    def _shrunk(self, found: tuple[Settings, Sized]) -> tuple[Settings, Sized]:
        """The same with each size, one after the other, as small as the policy runs with."""
        for axis in self.space.sizes:
            step = Fraction(1, 1000) if axis.kind == "share" else Fraction(1)
            low, most = 0, int((Quantity.parse(found[0][axis.name]).constant or 0) / step)
            while low < most:
                middle = (low + most) // 2
                tried = self._sized(found[0] | {axis.name: axis.spelled(middle * step)})
                if tried is not None and tried[1].bytes <= found[1].bytes:
                    found, most = tried, middle
                else:
                    low = middle + 1
        return found

    def _leanest(self, draw: Draw, best: tuple[Settings, Sized] | None) -> tuple[Settings, Sized] | None:
        """The smallest of a draw, if that is less than the best so far."""
        found = self._scaled(draw, self._smallest(draw))
        return found if found is not None and (best is None or found[1].bytes < best[1].bytes) else best

    def most(self) -> int:
        """Bytes from which on the policy, in its own proportions, evicts nothing, or the most that it can take."""
        found = self._scaled(Draw(), self._largest(Draw(), lambda sized: sized.idle))
        return found[1].bytes if found is not None else self.sizer.full

    # What chance says ---------------------------------------------------------------------------------------------

    def _anywhere(self) -> Draw:
        values = {axis.name: self.rng.choice(axis.values) for axis in self.space.others if self.rng.random() > OLD}
        return Draw(values, {axis.name: self._factor() for axis in self.space.sizes} if self._several else {})

    def _beside(self, draw: Draw) -> Draw:
        """The same with one or two params a little different."""
        values, factors = dict(draw.values), dict(draw.factors)
        axes = [*self.space.others, *(self.space.sizes if self._several else ())]
        for axis in self.rng.sample(axes, min(len(axes), self.rng.randint(1, 2))):
            if axis.size:
                factors[axis.name] = factors.get(axis.name, 1.0) * math.sqrt(self._factor())
            else:
                values[axis.name] = self._step(axis, values.get(axis.name, axis.default))
        return Draw(values, factors)

    def _step(self, axis: Axis, value: Fraction) -> Fraction:
        """A value one to three places off."""
        here = min(range(len(axis.values)), key=lambda place: abs(axis.values[place] - value))
        there = here + self.rng.choice((-3, -2, -1, 1, 2, 3))
        return axis.values[min(max(0, there), len(axis.values) - 1)]

    def _factor(self) -> float:
        return float(SPREAD ** self.rng.uniform(-1, 1))

    @property
    def _several(self) -> bool:
        """Of one size alone the proportions say nothing."""
        return len(self.space.sizes) > 1

    # What comes to a memory ---------------------------------------------------------------------------------------

    def _fitted(self, draw: Draw, target: int) -> Candidate | None:
        settings = self._sized(self._settings(draw, 1.0))
        if self.space.sizes:
            settings = self._scaled(draw, self._largest(draw, lambda sized: sized.bytes > target, target))
        if settings is None or settings[1].bytes > target:
            return None
        return self._candidate(draw, settings[0])

    def _candidate(self, draw: Draw, settings: Settings) -> Candidate | None:
        """None where the settings make no sense, or do what another candidate does."""
        sized = self.sizer(settings)
        if sized is None or sized.policy.digest in self._seen:
            return None
        self._seen.add(sized.policy.digest)
        self._count += 1
        return Candidate(self._count - 1, draw, settings, sized)

    def _largest(self, draw: Draw, too_large: Callable[[Sized], bool], target: int = 0) -> float:
        """The largest factor at which sizes are not yet too large, or the smallest at which they are idle."""
        low, high = -16.0, 16.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = self._scaled(draw, 2**middle)
            if found is not None and too_large(found[1]):
                high = middle
            else:
                low = middle
                if found is not None and CLOSE * target <= found[1].bytes <= target:
                    break
        return 2.0 ** (low if target else high)

    def _smallest(self, draw: Draw) -> float:
        """The smallest factor at which the policy runs."""
        low, high = -16.0, 16.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._scaled(draw, 2**middle) is not None else (middle, high)
        return 2.0**high

    def _scaled(self, draw: Draw, factor: float) -> tuple[Settings, Sized] | None:
        return self._sized(self._settings(draw, factor))

    def _sized(self, settings: Settings) -> tuple[Settings, Sized] | None:
        sized = self.sizer(settings)
        return None if sized is None else (settings, sized)

    def _settings(self, draw: Draw, factor: float) -> Settings:
        sizes = {
            axis.name: _size(axis, factor * draw.factors.get(axis.name, 1.0), self.sizer.lengths.whole)
            for axis in self.space.sizes
        }
        values = {**draw.values, **sizes}
        spelled = {axis.name: axis.spelled(values[axis.name]) for axis in self.space.axes if axis.name in values}
        return self.space.given | spelled


def _size(axis: Axis, factor: float, most: int) -> Fraction:
    """A size times a factor: whole tokens up to twice the text, which is room for all of it in pages, or a share of at
    most 1 in thousandths."""
    value = float(axis.default) * factor
    if axis.kind == "whole":
        return Fraction(min(max(round(value), min(1, int(axis.values[0]))), 2 * most))
    if axis.kind == "share":
        return Fraction(min(max(1, round(1000 * value)), 1000), 1000)
    return Fraction(f"{value:.2e}")


def levels(least: int, most: int, count: int) -> Iterator[int]:
    """So many memories from the least to the most, by equal factors."""
    for place in range(count):
        yield round(least * (most / least) ** (place / max(1, count - 1)))
