"""docs/evidence.md is what its rows say, and every picture beside them is on it."""

import re
from pathlib import Path

import pytest

from kvpolicy.lab.suites.__main__ import ITEMS, SIZE
from kvpolicy.lab.suites.evidence_page import drawn_names, page
from kvpolicy.lab.suites.long_outputs import BUDGETS, PLACES, rows_of
from kvpolicy.lab.suites.running import SUITES, about_of, outcome, suite_named

DOCS = Path(__file__).parents[1] / "docs"
ROWS = DOCS / "evidence"


@pytest.fixture(scope="module")
def text() -> str:
    return (DOCS / "evidence.md").read_text(encoding="utf-8")


def test_the_page_is_what_its_rows_say(text: str) -> None:
    assert page(ROWS) == text, "stale: run python -m kvpolicy.lab.suites --page"


def test_the_page_is_about_every_experiment(text: str) -> None:
    """Every experiment has rows, and every picture that can be drawn of them is there and shown."""
    shown = set(re.findall(r"!\[[^]]+\]\(evidence/([^)]+)\)", text))
    assert {path.name for path in ROWS.glob("*.png")} == shown
    drawn = {f"{name}.png" for name in (BUDGETS, PLACES) if rows_of(ROWS)}
    for name in SUITES:
        told = outcome(suite_named(name), ROWS / name)
        assert {each.name for each in told.suite.experiments} == set(told.found)
        drawn |= {f"{each}.png" for each in drawn_names(told)}
    assert drawn == shown
    for picture in shown:
        data = (ROWS / picture).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) < 200_000


@pytest.mark.parametrize("name", SUITES)
def test_the_command_goes_on_with_these_rows(name: str) -> None:
    """Typed as it stands on the page it takes the rows up: another size would be refused as another run."""
    about = about_of(ROWS / name)
    assert (about["model"], about["task"], about["items"], about["size"]) == ("builtin:reasoner", "chain", ITEMS, SIZE)
