"""Counter-examples that the search once found: runtime and oracle keep the same tokens in all of them now."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpolicy.language import load_policy
from kvpolicy.testing.runner import run_tests

FILES = sorted((Path(__file__).parent / "found").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_runtime_and_oracle_agree_now(path: Path) -> None:
    for outcome in run_tests(load_policy(path), runtime=True):
        assert outcome.passed and outcome.evicted > 0, str(outcome)
