"""The generated parts of the pages: tables of what is installed, the language's reference, the verbs, the test kit.

``python -m kvpolicy.cli.pages`` writes them anew between their marks; a test fails where a page is stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvpolicy.architecture import families as shipped_families
from kvpolicy.cli import methods
from kvpolicy.cli.reference import render_commands, render_verbs
from kvpolicy.language import load_policy, shipped_policies
from kvpolicy.language.reference import render_reference
from kvpolicy.versions import Run, release, runs

ROOT = Path(__file__).parents[2]
PART = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n)(?P<text>.*?)(<!-- end of generated part -->)", re.DOTALL)


def policies() -> str:
    """Every shipped policy with its params."""
    rows = ["| policy | what it does | params | source |", "| --- | --- | --- | --- |"]
    for name in shipped_policies():
        policy = load_policy(name)
        params = ", ".join(f"`{param}={value.default.text}`" for param, value in policy.params.items())
        rows.append(f"| [`{name}`](policies/{name}.yaml) | {policy.summary} | {params} | {', '.join(policy.cite)} |")
    return "\n".join(rows)


def laws() -> str:
    """Every shipped policy with its paper, its pools and its laws."""
    rows = ["| method | paper | pools | memory | tokens read in a step |", "| --- | --- | --- | --- | --- |"]
    for name in shipped_policies():
        pools = ", ".join(f"{pool['name']} {pool['memory']}" for pool in methods.pools(name))
        told = [methods.law_words(name, what) for what in ("memory", "time")]
        rows.append(f"| [`{name}`](#{name}) | {_papers(name)} | {pools} | {told[0]} | {told[1]} |")
    return "\n".join(rows)


def method_texts() -> str:
    """What each shipped policy is and where it departs from its paper, as the head of its file says."""
    return "\n\n".join(map(_method_text, shipped_policies()))


def _method_text(name: str) -> str:
    header, policy = methods.header(name), load_policy(name)
    reads = [f"`{signal['name']}`" for signal in methods.signals(methods.plan_of(name))]
    lines = [f"### {name}", "", _plain(header.idea or policy.summary), ""]
    lines.append(f"- Text: [policies/{name}.yaml](../policies/{name}.yaml); {_papers(name) or 'no paper'}")
    lines.append(f"- Ranks by: {', '.join(reads) or 'nothing'}")
    if header.departures:
        lines.append(f"- Departs: {_plain(' '.join(header.departures))}")
    return "\n".join(lines)


def _papers(name: str) -> str:
    return ", ".join(f"[{paper}](https://arxiv.org/abs/{paper[6:]})" for paper in load_policy(name).cite)


def _plain(text: str) -> str:
    """A comment as Markdown: what it writes stays as written."""
    parts = text.split("`")
    return "`".join(re.sub(r"([*_<\[])", r"\\\1", part) if at % 2 == 0 else part for at, part in enumerate(parts))


def families() -> str:
    """Every family of models that can be patched."""
    rows = ["| family | model types | covers |", "| --- | --- | --- |"]
    for name, family in sorted(shipped_families().items()):
        types = ", ".join(f"`{model_type}`" for model_type in family.model_types)
        covers = f"{family.covers}: refused, {family.refused}" if family.refused else family.covers
        rows.append(f"| [{name}](patches/{name}.py) | {types} | {covers} |")
    return "\n".join(rows)


def tested_versions() -> str:
    """What passed on which transformers and torch, as `make matrix` recorded it."""
    if not runs():
        return "Nothing is on record yet: `make matrix` makes it."
    torches = sorted({run.torch for run in runs()}, key=lambda text: (release(text), text))
    rows = [
        f"| transformers | {' | '.join(f'torch {torch}' for torch in torches)} |",
        "| --- " * (1 + len(torches)) + "|",
    ]
    for version in sorted({run.transformers for run in runs()}, key=release):
        cells = [
            _verdict([run for run in runs() if (run.transformers, run.torch) == (version, torch)]) for torch in torches
        ]
        rows.append(f"| {version} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _verdict(found: list[Run]) -> str:
    """One cell: what every Python said of a pair of versions."""
    if not found:
        return "not tested"
    failed = {test for run in found for test in run.failed}
    families = len(set.intersection(*(set(run.families) for run in found)))
    said = f"{len(failed)} tests failed" if failed else f"passed, {families} model types"
    return f"{said} (Python {', '.join(run.python for run in found)}; {max(run.date for run in found)})"


def test_kit(what: str) -> str:
    """Patterns, claims or traces, as the test kit describes them."""
    from kvpolicy.testing import reference  # like a verb: nothing that computes is imported before it is needed

    return str(getattr(reference, f"render_{what}")())


PARTS: dict[str, Callable[[], str]] = {
    "policies": policies,
    "laws": laws,
    "methods": method_texts,
    "architectures": families,
    "versions": tested_versions,
    "language": lambda: render_reference().strip(),
    "verbs": render_verbs,
    "commands": render_commands,
    "patterns": partial(test_kit, "patterns"),
    "claims": partial(test_kit, "claims"),
    "traces": partial(test_kit, "traces"),
}


def refreshed(page: str) -> str:
    """A page with every generated part made anew.

    Raises:
        KeyError: a mark names a part that nobody makes.
    """
    return PART.sub(lambda part: f"{part[1]}\n{PARTS[part['name']]()}\n\n{part[4]}", page)


def pages(root: Path = ROOT) -> list[Path]:
    """The pages of a checkout."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main() -> int:
    """Write what is stale; returns how many pages were."""
    stale = [
        page for page in pages() if refreshed(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")
    ]
    for page in stale:
        page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}", file=sys.stderr)
    return len(stale)


if __name__ == "__main__":
    main()
