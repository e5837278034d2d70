"""A pytest plugin for one run of the matrix: leaves out families that this transformers has not, and tells the rest.

`-p tests.matrix.plugin --told FILE` writes {"failed": [...], "families": [...], "count": n} when the session ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from kvpolicy.architecture import architectures

TOLD = pytest.StashKey["Told"]()


class Told:
    """Which tests there were, of which families, and which of them failed."""

    def __init__(self) -> None:
        self.outcomes: dict[str, bool] = {}
        self.families: dict[str, set[str]] = {}

    def result(self) -> dict[str, Any]:
        """What the matrix keeps: a family counts where it had tests, and all passed."""
        failed = sorted(test for test, passed in self.outcomes.items() if not passed)
        shown = {family for test in self.outcomes for family in self.families.get(test, ())}
        broken = {family for test in failed for family in self.families.get(test, ())}
        return {"count": len(self.outcomes), "failed": failed, "families": sorted(shown - broken)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--told", type=Path, required=True, help="where the result is written, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TOLD] = Told()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = architectures()
    for item in items:
        params = getattr(item, "callspec", None)
        named = (
            {value for value in params.params.values() if isinstance(value, str) and value in known}
            if params
            else set()
        )
        config.stash[TOLD].families[item.nodeid] = named
        for family in sorted(named - set(CONFIG_MAPPING)):
            item.add_marker(pytest.mark.skip(reason=f"this transformers has no {family}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report: pytest.TestReport = yield
    outcomes = item.config.stash[TOLD].outcomes
    if report.failed or (report.when == "call" and report.passed):
        outcomes[item.nodeid] = outcomes.get(item.nodeid, True) and report.passed
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        COLLECTING.append(report.nodeid)


COLLECTING: list[str] = []
"""Files that could not even be read."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    told = session.config.stash[TOLD]
    told.outcomes |= dict.fromkeys(COLLECTING, False)
    path: Path = session.config.getoption("--told")
    path.write_text(json.dumps(told.result(), indent=2) + "\n", encoding="utf-8")
