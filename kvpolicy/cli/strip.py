"""What `kvpolicy simulate` prints: for each policy, tokens by moments, counts, the mass kept, and what was lost.

Pools differ by the shape of their marks as well as by colour, so that either will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.text import Text

from kvpolicy.cli import output
from kvpolicy.cli.picture import strip
from kvpolicy.cli.words import plural

if TYPE_CHECKING:
    from kvpolicy.lab.grid import Cell
    from kvpolicy.lab.simulation import Course, Loss, Simulation

POOLS = (("█", "▒", "cyan"), ("●", "○", "yellow"), ("◆", "◇", "green"), ("▲", "△", "magenta"))
"""Marks of a pool's tokens, safe and ranked, and their colour; a fifth pool begins anew."""

FEW, GONE, MISSED, UNSAID = "░", "·", "×", " "
MISSED_STYLE = "bold red"

ROWS = 24
LOSSES = 6
NARROW = 48
"""Columns that a policy needs at least; where they are not there for all, policies stand one under the other."""

GAP = 3
SIDES = 21
"""Columns beside the picture: t on the left, tokens and mass on the right."""


def page(simulations: Sequence[Simulation], title: str, width: int) -> Iterator[Text]:
    """The whole page, in lines of at most ``width`` columns."""
    shown = simulations[0].shown
    heading = Text(title, style="bold")
    heading.append(
        f"\nlayer {shown.layer}, row {shown.row}, KV head {shown.head}: {plural(shown.prompt, 'prompt token')}, then "
        f"{shown.length - shown.prompt}; a line is a moment, a column some tokens",
        style="not bold",
    )
    yield from heading.wrap(output.stdout(), width)
    beside = min(len(simulations), max(1, (width + GAP) // (NARROW + GAP)))
    share = min(100, (width + GAP) // beside - GAP)
    parts = [list(part(simulation, share)) for simulation in simulations]
    for line in (line for lines in parts for line in lines):
        line.truncate(share, overflow="ellipsis")
    for first in range(0, len(parts), beside):
        yield Text()
        yield from _side_by_side(parts[first : first + beside], share)
    yield Text()
    yield from Text("   ").join(_legend(simulations)).wrap(output.stdout(), width)


def part(simulation: Simulation, width: int) -> Iterator[Text]:
    """One policy, in lines of at most ``width`` columns."""
    course = simulation.shown
    heading = Text(simulation.label, style="bold")
    heading.append(f"  keeps {course.mean_mass:.1%} of the attention", style="not bold")
    yield heading
    yield from picture(course, width)
    yield Text()
    yield from _lines(course, width)
    yield Text()
    yield from _losses(course, width)
    if len(simulation.courses) > 1:
        worst = simulation.worst
        kept = f"{simulation.mean_mass:.1%} on average, worst {simulation.min_mass:.1%}"
        yield Text(f"all {len(simulation.courses)} KV heads: {kept}")
        place = f"layer {worst.layer}, row {worst.row}, KV head {worst.head}, t = {worst.t[worst.worst]}"
        yield Text(f"  worst: {place}", style="dim")


def picture(course: Course, width: int) -> Iterator[Text]:
    """A line per moment: t, a mark for some tokens each, and how many tokens and how much attention is kept."""
    from kvpolicy.lab.grid import edges, rows, sampled

    cells = edges(course.length, max(1, width - SIDES))
    room = len(cells) - 1
    step = cells[1] - cells[0]
    prompt = min(room, -(-course.prompt // step))
    ruler = _fit(f"prompt {course.prompt}", prompt) + _fit("generated", room - prompt)
    yield Text(f"{'t':>5}  {ruler}  tokens  mass", style="dim")
    moments = sampled(len(course.t), ROWS)
    for moment, row in zip(moments, rows(course, moments, cells), strict=True):
        line = Text(f"{course.t[moment]:>5}  ")
        for cell in row:
            line.append(*_mark(cell))
        line.append(f"  {int(course.resident[:, moment].sum()):>6}  {course.mass[moment]:>4.0%}")
        yield line
    yield Text(f"{'':>5}  a column is {plural(step, 'token')}", style="dim")


def _mark(cell: Cell) -> tuple[str, str]:
    """A mark and its style."""
    if cell.missed:
        return MISSED, MISSED_STYLE
    if cell.pool is None:
        return (GONE, "dim") if cell.said else (UNSAID, "")
    safe, ranked, colour = POOLS[cell.pool % len(POOLS)]
    return (FEW if 2 * cell.share < 1 else safe if cell.safe else ranked), colour


def _lines(course: Course, width: int) -> Iterator[Text]:
    """Each pool's tokens and the mass, from the first moment to the last."""
    names = [name if len(name) <= 10 else name[:9] + "…" for name in course.pools]
    label = max(len(name) for name in [*names, "mass"])
    cells = min(40, width - label - 2, len(course.t))
    said = f"t = {course.t[0]}"
    yield Text(f"{'':<{label}}  {said}{f't = {course.t[-1]}':>{max(1, cells - len(said))}}", style="dim")
    for number, name in enumerate(names):
        resident = course.resident[number]
        yield Text(f"{name:<{label}}  ").append(strip(resident.tolist(), cells), POOLS[number % len(POOLS)][2])
        yield Text(f"{'':<{label}}  {_occupancy(course, number)}", style="dim")
    percent = [round(100 * share) for share in course.mass.tolist()]
    yield Text(f"{'mass':<{label}}  {strip(percent, cells, most=100, of=min)}")
    worst = f"worst {course.min_mass:.1%} at t = {course.t[course.worst]}"
    yield Text(f"{'':<{label}}  {course.mean_mass:.1%} kept, {worst}", style="dim")


def _occupancy(course: Course, number: int) -> str:
    resident, budgets = course.resident[number], course.budget[number]
    known = sorted({int(budget) for budget in budgets.tolist() if budget == budget})
    budget = "no budget"
    if known:
        budget = f"budget {known[0]}" if len(known) == 1 else f"budget {known[0]} to {known[-1]}"
    return f"{int(resident.max())} tokens at most, {budget}"


def _losses(course: Course, width: int) -> Iterator[Text]:
    """What was wanted after it had left, the dearest first."""
    gone = int(course.evicted.sum())
    said = f"{gone:,} evicted in {plural(int((course.evicted > 0).sum()), 'update')}"
    yield Text(said)
    if not course.losses:
        if gone:
            yield Text("none of them was wanted later", style="dim")
        return
    yield Text("wanted later:")
    yield Text(f"  {'tokens':<13}{'left at t':>12}{'wanted at t':>13}{'lost':>8}", style="dim")
    for loss in course.losses[:LOSSES]:
        yield _loss(loss)
    more = course.losses[LOSSES:]
    if more:
        cost = sum(loss.cost for loss in more)
        yield Text(f"  {f'and {len(more)} more':<13}{'':>25}{cost:>8.1%}")
    yield Text(f"  {'spread thin':<13}{'':>25}{course.never_wanted:>8.1%}", style="dim")


def _loss(loss: Loss) -> Text:
    first, last = loss.tokens[0], loss.tokens[-1]
    tokens = str(first) if first == last else f"{first}..{last}"
    left = str(loss.left[0]) if loss.left[0] == loss.left[1] else f"{loss.left[0]}..{loss.left[1]}"
    line = Text("  ").append(f"{tokens:<13}", MISSED_STYLE)
    return line.append(f"{left:>12}{loss.wanted:>13}{loss.cost:>8.1%}")


def _legend(simulations: Sequence[Simulation]) -> Iterator[Text]:
    """The marks that may occur."""
    pools: dict[int, list[str]] = {}
    for simulation in simulations:
        for number, name in enumerate(simulation.shown.pools):
            names = pools.setdefault(number % len(POOLS), [])
            names += [name] if name not in names else []
    for number, names in sorted(pools.items()):
        safe, ranked, colour = POOLS[number]
        yield Text(f"{safe}{ranked}", colour).append(f" pool {' or '.join(names)}, safe and ranked", "default")
    yield Text(f"{FEW} fewer than half are kept")
    yield Text(f"{GONE} evicted")
    yield Text(MISSED, MISSED_STYLE).append(" evicted, and wanted now", "default")


def _side_by_side(parts: Sequence[Sequence[Text]], width: int) -> Iterator[Text]:
    for lines in zip_longest(*parts):
        joined = Text()
        for number, line in enumerate(lines):
            if line is not None:
                joined.append(" " * max(0, number * (width + GAP) - joined.cell_len)).append_text(line)
        yield joined


def _fit(text: str, width: int) -> str:
    """A stroke and a text, if there is room for it, in exactly so many columns."""
    return f"│{text if len(text) < width else ''}"[:width].ljust(width)
