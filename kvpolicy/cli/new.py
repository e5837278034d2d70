"""`kvpolicy new`: a policy to start from, or a package that adds a signal, each with tests that pass right away."""

from __future__ import annotations

import json as json_text
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated

import typer
from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.cli.arguments import Json
from kvpolicy.errors import UsageError
from kvpolicy.language import loads_policy, shipped_policies
from kvpolicy.language.schema import json_schema
from kvpolicy.language.signals import signal_names
from kvpolicy.language.vocabulary import nearest

EPILOG = (
    "Examples: kvpolicy new my-policy; kvpolicy new my-raas --from raas -o policies; kvpolicy new key-power --scorer. "
    "Nothing that exists is overwritten."
)

BLANK = "blank"
SCHEMA = "kvpolicy.schema.json"
MODELINE = f"# yaml-language-server: $schema={SCHEMA}\n"
PACKAGE = {  # template -> file of the package
    "policy.yaml": "$name.yaml",
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "init.py": "src/$module/__init__.py",
    "on_torch.py": "src/$module/on_torch.py",
    "test.py": "tests/test_$module.py",
}


def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the policy, or of the signal.")],
    start: Annotated[
        str, typer.Option("--from", metavar="SPEC", help="The shipped policy to start from, or blank.")
    ] = BLANK,
    scorer: Annotated[bool, typer.Option("--scorer", help="A package that adds a signal, in a folder NAME.")] = False,
    to: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Write there.")] = Path("."),
    json: Json = False,
) -> None:
    """Write a policy to start from, with comments, tests, and a schema for editors; or a package for a new signal."""
    if scorer:
        if start != BLANK:
            raise UsageError("--scorer comes with a policy of its own; leave out --from")
        _check_signal(name)
        folder, made = to / name, dict(_package(name))
    else:
        folder, made = to, {f"{name}.yaml": _policy(name, start)}
    written = _write(folder, made)
    if json:
        output.json_object({"name": name, "from": start, "scorer": scorer, "files": [str(path) for path in written]})
        return
    for path in written:
        output.data(f"wrote {escape(str(path))}")
    output.note(f"[dim]next: {escape(_next(folder, name, scorer))}[/]")


def _next(folder: Path, name: str, scorer: bool) -> str:
    if scorer:
        return f"pip install -e {folder}; cd {folder}; pytest"
    return f"kvpolicy test {folder / name}.yaml"


def _policy(name: str, start: str) -> str:
    """The text of a new policy. Raises UsageError: there is no such start; PolicyError: no policy can be named so."""
    shipped = shipped_policies()
    if name.endswith((".yaml", ".yml")):
        raise UsageError(f"{name} is the name of a file; give the policy's, {Path(name).stem}")
    if start == BLANK:
        text = _filled("blank.yaml", name)
    elif start in shipped:
        text = _renamed(shipped[start].read_text(encoding="utf-8"), name, start)
    else:
        raise UsageError(f"no shipped policy is named {start!r}; {nearest(start, [*shipped, BLANK])}")
    if name in shipped:
        raise UsageError(f"{name} is the name of a shipped policy; choose another")
    loads_policy(text, f"{name}.yaml")
    return text


def _renamed(text: str, name: str, start: str) -> str:
    """A shipped policy's text under another name."""
    title = f"# {name}: begun as a copy of {start}, whose notes these are. Say what it does otherwise.\n#\n"
    return MODELINE + title + re.sub(r"(?m)^name:.*$", lambda _: f"name: {name}", text, count=1)


def _check_signal(name: str) -> None:
    if not re.fullmatch("[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UsageError(
            f"{name!r} cannot name a signal and its package; small letters, digits and `-`, as in key-power"
        )
    if name in signal_names():
        raise UsageError(f"there is a signal {name} already; kvpolicy list signals names them all")


def _package(name: str) -> Iterator[tuple[str, str]]:
    """Files of a package that adds a signal, by path."""
    for template, path in PACKAGE.items():
        yield Template(path).substitute(_words(name)), _filled(f"scorer/{template}", name)


def _filled(template: str, name: str) -> str:
    text = files("kvpolicy.cli").joinpath("templates", f"{template}.txt").read_text(encoding="utf-8")
    return Template(text).substitute(_words(name))


def _words(name: str) -> dict[str, str]:
    return {"name": name, "module": name.replace("-", "_")}


def _write(folder: Path, made: dict[str, str]) -> list[Path]:
    """Write new files, and the schema that their first line names where there is none yet. Raises UsageError."""
    there = [str(folder / path) for path in made if (folder / path).exists()]
    if there:
        raise UsageError(f"{', '.join(there)} exists, and nothing is overwritten; give another name or -o DIR")
    if not (folder / SCHEMA).exists():
        made = {**made, SCHEMA: json_text.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"}
    for path, text in made.items():
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UsageError(f"cannot make the folder of {folder / path}: {fault.strerror}") from fault
        output.write_file(folder / path, text)
    return [folder / path for path in made]
