"""Broken copies of the runtime are caught: a handful here, all of them in `make fuzz`."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvpolicy
from tests.mutation.check import changed_source
from tests.mutation.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.breaks)
def test_the_change_is_about_one_place(mutant: Mutant) -> None:
    path = Path(kvpolicy.__file__).parents[1].joinpath(*mutant.module.split(".")).with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    compile(changed_source(mutant, source), str(path), "exec")
    assert mutant.new != mutant.old


def test_there_are_enough() -> None:
    assert len({mutant.breaks for mutant in MUTANTS}) == len(MUTANTS) >= 25


def test_a_fragment_that_is_gone_is_loud() -> None:
    with pytest.raises(ValueError, match="has 0 of"):
        changed_source(MUTANTS[0], "nothing here")


def test_a_handful_is_caught() -> None:
    import subprocess
    import sys

    numbers = [str(number) for number in range(0, len(MUTANTS), 17)]
    run = subprocess.run(
        [sys.executable, "-m", "tests.mutation.check", *numbers],
        cwd=Path(kvpolicy.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("caught after") == len(numbers)
