"""Simulations as one HTML file that needs nothing beside it, and no JavaScript to be read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files

from kvpolicy.lab import drawing
from kvpolicy.lab.palette import pool_names, shade
from kvpolicy.lab.simulation import WANTED, Course, Loss, Simulation

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""The page may fetch nothing; a browser holds it to that."""

LOSSES = 12


def page(simulations: Sequence[Simulation], title: str) -> str:
    """The page. ``title`` says what text was fed; it and all names are escaped."""
    course = simulations[0].shown
    place = f"layer {course.layer}, row {course.row}, KV head {course.head}"
    told = f"{course.prompt} prompt tokens, then {course.length - course.prompt}. Shown: {place}."
    names = ", ".join(simulation.label for simulation in simulations)
    sections = "\n".join(
        _section(simulation, f"s{number}", simulations) for number, simulation in enumerate(simulations)
    )
    header = f"""<h1>{escape(names)}</h1>
<p>{escape(title)}</p>
<p class="faint">{escape(told)} Tokens run from top to bottom, oldest first, and time from left to right. Point at a
picture, or tap it, to read it.</p>
<ul class="legend">
{"".join(_legend(simulations))}</ul>"""
    after = f"""<div id="tip" role="status" hidden></div>
<script>
{part_file("page.js")}</script>"""
    return document(f"{names}: {title}", header, sections, after=after)


def document(title: str, header: str, main: str, *, style: str = "", after: str = "") -> str:
    """One self-contained page.

    Args:
        title: plain text. header, main, after: HTML, whatever came from outside escaped; ``after`` follows the rest.
        style: CSS that is added to that of all pages.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{part_file("page.css")}{style}</style>
</head>
<body>
<header>
{header}
</header>
<main>
{main}
</main>
{after}
</body>
</html>
"""


def part_file(name: str) -> str:
    """A file of the pages: `page.css`, `page.js`."""
    return files("kvpolicy.lab").joinpath(name).read_text(encoding="utf-8")


def _legend(simulations: Sequence[Simulation]) -> Iterator[str]:
    """Each colour and pattern that occurs, with its words."""
    for number, pool in enumerate(pool_names(simulations)):
        paint = drawing.stripes(f"legend-{number}", shade(number).safe, 1, 1)
        yield key(f'<defs>{paint}</defs><rect width="48" height="30" fill="url(#legend-{number})"/>', f"{pool}: safe")
        yield key(f'<rect width="48" height="30" fill="{shade(number).ranked}"/>', f"{pool}: ranked, the lowest goes")
    yield key('<rect class="said" width="48" height="30"/>', "evicted")
    missed = '<rect class="said" width="48" height="30"/><path class="missed" stroke-width="4" d="M0 15H48"/>'
    yield key(missed, f"evicted, and wanted now (over {WANTED:g} times an even share of the attention)")


def key(drawn: str, words: str) -> str:
    """An item of a legend."""
    return f'<li><svg viewBox="0 0 48 30" aria-hidden="true">{drawn}</svg>{escape(words)}</li>\n'


def _section(simulation: Simulation, name: str, all_of_them: Sequence[Simulation]) -> str:
    course = simulation.shown
    top = max(other.shown.highest for other in all_of_them)
    others = ""
    if len(simulation.courses) > 1:
        others = (
            f" Over all {len(simulation.courses)} KV heads: {simulation.mean_mass:.1%} on average, "
            f"{simulation.min_mass:.1%} at worst."
        )
    numbers = (
        f"Keeps <b>{course.mean_mass:.1%}</b> of the attention on average and {course.min_mass:.1%} at worst (t = "
        f"{course.t[course.worst]}), in {int(course.resident.sum(axis=0).max())} tokens at most.{others}"
    )
    charts = [
        _chart("Tokens", drawing.tokens(course, name), [0, course.length], course, True),
        _chart("Tokens held, by pool; dashed: the budget", drawing.occupancy(course, top), [top, 0], course),
        _chart("Attention kept, of the full cache’s", drawing.mass(course), ["100 %", "50 %", "0 %"], course),
    ]
    return f"""<section>
<h2>{escape(simulation.label)}</h2>
<p>{escape(simulation.policy.summary)}</p>
<p>{numbers}</p>
{"".join(charts)}<div>{_losses(course)}</div>
<script type="application/json">{_facts(course)}</script>
</section>"""


def _chart(caption: str, drawn: str, ticks: Sequence[object], course: Course, tokens: bool = False) -> str:
    """A drawing with its axes; the words are HTML, so that they stay readable however small the drawing."""
    y = "".join(tick("top", number / (len(ticks) - 1), str(mark)) for number, mark in enumerate(ticks))
    x = "".join(
        tick("left", number / 2, f"t = {course.t[round(number / 2 * (len(course.t) - 1))]}") for number in range(3)
    )
    if tokens and 0.12 < course.prompt / course.length < 0.9:
        y += tick("top", course.prompt / course.length, str(course.prompt))
    return f"""<figure>
<figcaption>{escape(caption)}</figcaption>
<div class="chart"><div class="y">{y}</div>
<div class="plot"{' data-tokens="1"' if tokens else ""}>{drawn}<div class="now" hidden></div></div>
<div class="x">{x}</div></div>
</figure>
"""


def tick(side: str, share: float, words: str) -> str:
    """A word beside a chart, at a share of its height (``side``: top) or width (left)."""
    place = ' class="first"' if share == 0 else ' class="last"' if share == 1 else ""
    return f'<span{place} style="{side}:{100 * share:.1f}%">{escape(words)}</span>'


def _losses(course: Course) -> str:
    gone = f"{int(course.evicted.sum())} tokens evicted"
    if not course.losses:
        return f"<p>{gone}, none of them wanted later.</p>"
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in _row(loss))}</tr>" for loss in course.losses[:LOSSES])
    more = course.losses[LOSSES:]
    if more:
        rows += (
            f"<tr><td>and {len(more)} more</td><td></td><td></td><td>{sum(loss.cost for loss in more):.1%}</td></tr>"
        )
    rows += f"<tr><td>spread thin over others</td><td></td><td></td><td>{course.never_wanted:.1%}</td></tr>"
    head = "<tr><th>tokens</th><th>left at t</th><th>next wanted at t</th><th>attention lost</th></tr>"
    return f"<p>{gone}. Wanted later:</p>\n<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _row(loss: Loss) -> tuple[str, str, str, str]:
    def span(first: int, last: int) -> str:
        return str(first) if first == last else f"{first}–{last}"

    return span(loss.tokens[0], loss.tokens[-1]), span(*loss.left), str(loss.wanted), f"{loss.cost:.1%}"


def _facts(course: Course) -> str:
    """What the script tells, as JSON that cannot end its element."""
    pools = [
        {
            "name": name,
            "resident": resident,
            "budget": [None if number != number else int(number) for number in budget],
        }
        for name, resident, budget in zip(course.pools, course.resident.tolist(), course.budget.tolist(), strict=True)
    ]
    facts = {
        "t": course.t.tolist(),
        "newest": course.newest.tolist(),
        "prompt": course.prompt,
        "tokens": course.length,
        "mass": [round(share, 4) for share in course.mass.tolist()],
        "pools": pools,
    }
    return json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c")
