"""docs/evidence.md and its pictures, from rows that are kept beside it: equal rows make the same page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvpolicy.lab.suites import long_outputs
from kvpolicy.lab.suites.base import Found
from kvpolicy.lab.suites.claims import POINTS, Finding
from kvpolicy.lab.suites.markdown import cell, markdown
from kvpolicy.lab.suites.page import origin, pictures
from kvpolicy.lab.suites.running import SUITES, Outcome, outcome, suite_named

HEAD = """# Evidence

<!-- Written by `python -m kvpolicy.lab.suites` from the rows in docs/evidence. Change the rows or the program. -->

What is claimed of policies, judged by what came out here, whatever it was. All numbers come from rows in
[docs/evidence](evidence): `python -m kvpolicy.lab.suites` measures those that are missing and writes this page, with
`--page` it only writes the page. `kvpolicy compare --suite evidence|raas|scope` does the same with any model
([compare.md](compare.md#suites)).
"""

RULE = f"""A claim is about a difference of right answers on the same items. It **holds** where the whole 95 %
interval of that difference (Student's, over items) lies on the claim's side, **does not hold** where all of it lies on
the other, and **cannot be told** where it lies across, or where the full cache itself is right less often than the
claim needs. "As good" and "within" mean no more than {100 * POINTS:.0f} points below; "falls off" more than that below.
A claim about every budget holds where it holds at each, one about some budget where it holds at one.
"""

NOTES = "notes.md"
"""What people made of the numbers; it stands on the page as it is written."""


def page(folder: Path) -> str:
    """The page, from the rows of a folder.

    Raises:
        UsageError: the folder lacks the rows of a suite.
    """
    told = {name: outcome(suite_named(name), folder / name) for name in SUITES}
    parts = [HEAD, _made(told), "## What papers claim", RULE, _claims(told)]
    if (folder / NOTES).exists():
        parts += ["## What it may mean", (folder / NOTES).read_text(encoding="utf-8")]
    for name in SUITES:
        parts += [f"## {told[name].suite.title}", *_suite(told[name])]
    parts += ["## Fidelity on long outputs", *long_outputs.section(folder)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _made(told: dict[str, Outcome]) -> str:
    """When, with what and on what, a line for each suite."""
    lines = []
    for name, each in told.items():
        about = each.about
        lines.append(
            f"- `{about['command']}`: {origin(about)}; {about['cpu_seconds'] / 60:,.0f} minutes of processor time at "
            f"least (rows in [evidence/{name}](evidence/{name}))"
        )
    return "\n".join(lines)


def _claims(told: dict[str, Outcome]) -> str:
    lines = ["| claim | here | by what |", "| --- | --- | --- |"]
    for each in told.values():
        for finding in _findings(each):
            lines.append(f"| {cell(finding.says)} | **{finding.word}** | {cell(finding.where)} |")
    return "\n".join(lines)


def _findings(told: Outcome) -> Iterator[Finding]:
    for found in told.found.values():
        yield from found.findings


def _suite(told: Outcome) -> Iterator[str]:
    drawn = dict.fromkeys(drawn_names(told), True)
    for experiment in told.suite.experiments:
        found = told.found.get(experiment.name)
        if found is None:
            continue
        yield f"### {experiment.title}"
        yield f"In the paper: {experiment.paper}."
        if experiment.name in drawn:
            yield f"![{_summary(experiment.title, found)}](evidence/{experiment.name}.png)"
        if found.grid is not None:
            yield markdown(found.grid)
        elif not (found.panels and found.panels[0].axis.shares):
            yield from (markdown(each) for each in found.tables)
        if found.findings:
            yield "\n".join(f"- {each.says}: **{each.word}**." for each in found.findings)
        if refused := told.refused.get(experiment.name):
            yield "Not run: " + "; ".join(_short(each) for each in refused) + "."


def drawn_names(told: Outcome) -> list[str]:
    """Experiments that have a picture."""
    return [name for name, found in told.found.items() if found.heats or any(panel.lines for panel in found.panels)]


def _summary(title: str, found: Found) -> str:
    """What a picture shows, for who cannot see it."""
    words = [f"{each.says}: {each.word}" for each in found.findings[:3]]
    return "; ".join([title, *words]).replace("[", "(").replace("]", ")")


def _short(refusal: str) -> str:
    """A refusal up to its reason, without the way out."""
    return cell(refusal.split("; ")[0].partition(" (")[0])


def drawings(folder: Path) -> dict[str, bytes]:
    """By file name, every picture of the page.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    drawn: dict[str, bytes] = {}
    for name in SUITES:
        drawn |= pictures(outcome(suite_named(name), folder / name))
    drawn |= long_outputs.drawings(folder)
    return {f"{key}.png": data for key, data in drawn.items()}
