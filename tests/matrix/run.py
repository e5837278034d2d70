"""Run the tests that decide on the oldest and newest transformers and torch, and write down what passed.

    python -m tests.matrix.run                               # what pyproject.toml and pip say: 2 x 2
    python -m tests.matrix.run --transformers 5.4.0 5.23.0 --torch 2.13.0
    python -m tests.matrix.run --every-minor

What comes of it goes to `patches/matrix.json`, which is installed with the package: `kvpolicy.apply` warns outside the
range that passed there, and the pages are made from it (`python -m kvpolicy.cli.pages`). Exit code 1 where a test
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import date
from itertools import product
from pathlib import Path

from kvpolicy.versions import Release, Run, release, runs
from tests.matrix.environments import CONSTRAINTS, PYPROJECT, ROOT, Environment, NotInstalled, released

RECORD = ROOT / "patches" / "matrix.json"
TESTS = ("tests/patches", "tests/patching")
"""Parity of every family, every way of calling a model, compiled steps, apply and remove."""
WITHOUT = "not slow and not smollm2 and not gpu"
HOURS = 2


def oldest(package: str) -> str:
    """The floor that pyproject.toml states, as a full version."""
    said = re.search(rf'"{package}>=([\d.]+)', PYPROJECT.read_text(encoding="utf-8"))
    assert said is not None, f"pyproject.toml states no floor for {package}"
    return said[1] + ".0" * (2 - said[1].count("."))


def pinned(package: str) -> str:
    """The version in constraints.txt."""
    said = re.search(rf"^{package}==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert said is not None, f"constraints.txt states no {package}"
    return said[1]


def minors(package: str) -> list[str]:
    """The last release of every minor from the floor on, within its major version, the oldest first."""
    found: dict[Release, str] = {}
    for text in sorted(released(package), key=release):
        if release(text) >= release(oldest(package)) and release(text)[0] == release(oldest(package))[0]:
            found[release(text)[:2]] = text
    return list(found.values())


def chosen(options: argparse.Namespace) -> list[Environment]:
    """The pairs to run."""
    torch = options.torch or [oldest("torch"), pinned("torch")]
    if options.transformers:
        transformers = options.transformers
    elif options.every_minor:
        transformers = minors("transformers")
    else:
        transformers = [oldest("transformers"), (minors("transformers") or [pinned("transformers")])[-1]]
    return [Environment(*pair) for pair in product(dict.fromkeys(torch), dict.fromkeys(transformers))]


def run(environment: Environment) -> Run:
    """The tests in one environment."""
    settings = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    tests = [test for test in TESTS if (ROOT / test).exists()]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        command = [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.matrix.plugin"]
        command += ["--told", told, "-m", WITHOUT, *tests]
        log = environment.thin / "pytest.log"
        with log.open("w") as output:
            subprocess.run(
                list(map(str, command)), cwd=ROOT, env=settings, stdout=output, stderr=output, timeout=3600 * HOURS
            )
        if not told.is_file():
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            result = {"count": 0, "failed": [f"pytest did not come to its end: {' '.join(last)}"], "families": []}
        else:
            result = json.loads(told.read_text(encoding="utf-8"))
    return Run(
        transformers=environment.transformers,
        torch=environment.torch,
        python=".".join(platform.python_version_tuple()[:2]),
        date=date.today().isoformat(),
        passed=result["count"] > 0 and not result["failed"],
        failed=tuple(result["failed"]),
        families=tuple(result["families"]),
    )


def write(new: Run) -> None:
    """Put a run into the record, in place of an older one of the same versions."""
    runs.cache_clear()
    kept = [old for old in runs() if _blank(old) != _blank(new)]
    ordered = sorted([*kept, new], key=lambda each: (release(each.torch), release(each.transformers), each.python))
    RECORD.write_text(json.dumps({"runs": [asdict(each) for each in ordered]}, indent=1) + "\n", encoding="utf-8")


def _blank(run: Run) -> Run:
    return replace(run, date="", passed=True, failed=(), families=())


def main() -> int:
    """Make what is missing, run, record; returns 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", nargs="+", metavar="VERSION")
    parser.add_argument("--torch", nargs="+", metavar="VERSION")
    parser.add_argument("--every-minor", action="store_true", help="every minor version of transformers in between")
    wrong = False
    for environment in chosen(parser.parse_args()):
        pair = f"transformers {environment.transformers}, torch {environment.torch}"
        try:
            environment.make()
        except NotInstalled as reason:
            print(f"{pair}: not tested here, {reason}", flush=True)
            continue
        result = run(environment)
        write(result)
        wrong = wrong or not result.passed
        print(f"{pair}: {'passed' if result.passed else f'{len(result.failed)} failed'}", flush=True)
        for test in result.failed:
            print(f"    {test}", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
