"""Every code block in README.md and docs/*.md runs: python and bash as a reader would run them, policies are loaded.

Blocks of one page share a Python namespace and an empty working folder. In bash blocks `kvpolicy` and `python` are
those under test, and `make` only checks that the target exists. A block that a test cannot run is skipped in the page
itself, with its reason: `<!-- skip: next "needs a GPU" -->`. Output, and anything else not meant to run, is `text`.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from kvpolicy import loads_policy

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md")])
RUN = ("python", "bash", "yaml")
SHOWN = ("text", "json")
SECONDS_PER_BLOCK = 300


def run_bash(example: Example) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example.parsed],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS_PER_BLOCK,
    )
    if done.returncode:
        said = textwrap.indent(f"{done.stdout}{done.stderr}", "  ")
        pytest.fail(f"{example.path}:{example.line}: exit code {done.returncode}\n{said}", pytrace=False)


def load_yaml(example: Example) -> None:
    if example.parsed.lstrip().startswith("kvpolicy:"):
        loads_policy(example.parsed, filename=f"{example.path}:{example.line}")


SYBIL = Sybil(
    [
        PythonCodeBlockParser(),
        CodeBlockParser("bash", run_bash),
        CodeBlockParser("yaml", load_yaml),
        SkipParser(),
    ],
    path=str(ROOT),
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def languages(page: Path) -> list[str]:
    """The word after each opening fence, "" where there is none."""
    fences = [line.strip() for line in page.read_text(encoding="utf-8").splitlines() if line.strip().startswith("```")]
    return [fence.strip("`") for fence in fences[::2]]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with this checkout's `kvpolicy` and `python` ahead on the PATH."""
    programs = tmp_path / "programs"
    programs.mkdir()
    python = shlex.quote(sys.executable)
    for name, line in {
        "kvpolicy": f'exec {python} -m kvpolicy "$@"',
        "python": f'exec {python} "$@"',
        "make": f'exec {shutil.which("make")} --dry-run --directory {shlex.quote(str(ROOT))} "$@" >/dev/null',
    }.items():
        script = programs / name
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def marks(page: Path) -> list[pytest.MarkDecorator]:
    """A page that uses the fetched model carries the mark of the tests that need it."""
    return [pytest.mark.smollm2] if "builtin:smollm2" in page.read_text(encoding="utf-8") else []


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page), marks=marks(page)) for page in PAGES])
def test_the_code_blocks_of_a_page_run(page: Path, reader: Path) -> None:
    for example in SYBIL.parse(page).examples():
        with contextlib.suppress(SkipTest):  # the page says why
            example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_code_block_slips_through(page: Path) -> None:
    """Every fence names a language that is run, or one that is only shown."""
    assert set(languages(page)) <= {*RUN, *SHOWN}


def test_every_picture_is_shown_and_its_page_says_how_to_make_it() -> None:
    shown = [
        (page, picture)
        for page in PAGES
        for picture in re.findall(r"!\[[^]]+\]\(pictures/([^)]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert {path.name for path in (ROOT / "docs" / "pictures").iterdir()} == {picture for _, picture in shown}
    for page, picture in shown:
        data = (ROOT / "docs" / "pictures" / picture).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) < 150_000
        assert f"--png {picture}" in page.read_text(encoding="utf-8")
