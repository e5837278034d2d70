"""A course of a simulation as SVG: its moments from left to right, its tokens from top to bottom.

Paths are in moments and tokens; ``page.js`` reads the facts that it tells off these very paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from kvpolicy.lab.palette import shade
from kvpolicy.lab.simulation import GONE, MISSED, Course, Runs

WIDE, HIGH, LOW = 1000, 640, 190
"""Units of the drawings: every one is WIDE; the picture of tokens is HIGH, the charts below it LOW."""

MOST_STROKES = 30_000
"""Stretches of missed tokens in one drawing; where there are more, short gaps between them are closed."""


def tokens(course: Course, name: str) -> str:
    """Who is held when. ``name`` begins the ids of its patterns, and is unique in the page."""
    moments = len(course.t)
    across, down = WIDE / moments, HIGH / course.length
    safe = [pool for pool in range(len(course.pools)) if (course.states.state == 3 + 2 * pool).any()]
    patterns = "".join(stripes(f"{name}-{pool}", shade(pool).safe, across, down) for pool in safe)
    paths = [f'<path class="said" d="{_said(course)}"/>']
    for state in np.unique(course.states.state[course.states.state != GONE]).tolist():
        pool, is_safe = divmod(state - 2, 2)
        fill = f"url(#{name}-{pool})" if is_safe else shade(pool).ranked
        words = f"{'safe' if is_safe else 'ranked'} in pool {course.pools[pool]}"
        runs = course.states.where(course.states.state == state)
        paths.append(f'<path data-state="{words}" fill="{fill}" d="{"".join(_boxes(runs))}"/>')
    missed = course.wanted.where(course.wanted.state == MISSED)
    if len(missed.token):
        thick = max(2.5, 0.7 * down)
        paths.append(f'<path class="missed" stroke-width="{thick:.1f}" d="{"".join(_strokes(missed))}"/>')
    label = f"Tokens from top to bottom, time from left to right: what {len(course.pools)} pools hold"
    drawn = f'<defs>{patterns}</defs><g transform="scale({across:.6g} {down:.6g})">{"".join(paths)}</g>'
    return svg(label, HIGH, drawn)


def occupancy(course: Course, top: int) -> str:
    """Tokens in each pool, one upon the other, and dashed the budgets, each upon the pools below it; 0..``top``."""
    moments, scale = len(course.t), (LOW - 4) / top  # room for the stroke of a budget at the top
    across = WIDE / moments
    paths, budgets, floor = [], [], np.zeros(moments)
    for number in range(len(course.pools)):
        ceiling = floor + course.resident[number]
        outline = _steps(LOW - ceiling * scale, across) + "L" + _steps(LOW - floor * scale, across, back=True)[1:] + "z"
        paths.append(f'<path fill="{shade(number).ranked}" stroke="{shade(number).safe}" d="{outline}"/>')
        budget = floor + course.budget[number]
        known = np.flatnonzero(~np.isnan(budget))
        if len(known):
            line = _steps(LOW - budget[known] * scale, across, start=int(known[0]))
            budgets.append(f'<path class="halo" d="{line}"/><path class="budget" d="{line}"/>')
        floor = ceiling
    return svg("Tokens held in each pool over time, and the budgets", LOW, "".join(paths + budgets))


def mass(course: Course) -> str:
    """The share of the attention that is kept, 0..100 %."""
    lines = "".join(
        f'<line class="grid" x1="0" x2="{WIDE}" y1="{y}" y2="{y}"/>' for y in (LOW / 4, LOW / 2, LOW * 3 / 4)
    )
    path = f'<path class="mass" d="{_steps(1 + (LOW - 2) * (1 - course.mass), WIDE / len(course.t))}"/>'
    return svg("Share of the attention that is kept, over time", LOW, lines + path)


def svg(label: str, high: int, content: str) -> str:
    return f'<svg viewBox="0 0 {WIDE} {high}" role="img" aria-label="{label}">{content}</svg>'


def stripes(name: str, colour: str, across: float, down: float) -> str:
    """Striped paint that is not stretched by the drawing's scale."""
    turned = f"scale({1 / across:.6g} {1 / down:.6g}) rotate(45)"
    return (
        f'<pattern id="{name}" width="9" height="9" patternUnits="userSpaceOnUse" patternTransform="{turned}">'
        f'<rect width="9" height="9" fill="{colour}"/><path class="stripe" d="M0 0V9"/></pattern>'
    )


def _said(course: Course) -> str:
    """The outline of all that has been said: a staircase."""
    path, moment = f"M0 0V{course.newest[0] + 1}", 0
    for here, (before, after) in enumerate(pairwise(course.newest.tolist()), 1):
        path += f"h{here - moment}v{after - before}"
        moment = here
    return path + f"H{len(course.t)}V0z"


def _boxes(runs: Runs) -> Iterator[str]:
    """A rectangle for each stretch, neighbours of one fate together."""
    stretches = sorted(zip(runs.start.tolist(), runs.stop.tolist(), runs.token.tolist(), strict=True))
    first = high = 0
    for number, (start, stop, token) in enumerate(stretches):
        if high and (start, stop, token) == (*stretches[number - 1][:2], first + high):
            high += 1
        else:
            first, high = token, 1
        if number + 1 == len(stretches) or stretches[number + 1] != (start, stop, token + 1):
            yield f"M{start} {first}h{stop - start}v{high}h-{stop - start}z"


def _strokes(missed: Runs) -> Iterator[str]:
    """A line for each stretch; the more there are, the longer the gaps that are closed."""
    stretches = list(zip(missed.token.tolist(), missed.start.tolist(), missed.stop.tolist(), strict=True))
    gap = 1
    while len(stretches) > MOST_STROKES and gap < 2**30:
        closed = [stretches[0]]
        for token, start, stop in stretches[1:]:
            last, begun, ended = closed[-1]
            if last == token and start - ended <= gap:
                closed[-1] = token, begun, stop
            else:
                closed.append((token, start, stop))
        stretches, gap = closed, 2 * gap
    yield from (f"M{start} {token}.5H{stop}" for token, start, stop in stretches)


def _steps(levels: Sequence[float] | np.ndarray, across: float, *, start: int = 0, back: bool = False) -> str:
    """A staircase through levels, each as wide as a moment; from right to left where it goes back."""
    corners: list[tuple[str, str]] = []
    for number, level in enumerate(np.asarray(levels).tolist(), start):
        if number > start and f"{level:.4g}" == corners[-1][1]:
            corners[-1] = f"{(number + 1) * across:.5g}", corners[-1][1]
        else:
            corners += [(f"{number * across:.5g}", f"{level:.4g}"), (f"{(number + 1) * across:.5g}", f"{level:.4g}")]
    return "M" + "L".join(" ".join(corner) for corner in (reversed(corners) if back else corners))
