"""Torch recipes of signals that other methods brought, beside the oracle's, in a few settings."""

from __future__ import annotations

from typing import Any

import pytest

from kvpolicy.scorers import keys
from kvpolicy.testing.scorers import check_scorer

ARGUMENTS: dict[str, dict[str, Any]] = {
    "gumbel-attention": {"temperature": 0.5, "growth": 0.1, "seed": 3},
    "above-average": {},
    "lag": {"lag": 3, "after": 1},
}
EACH = ("as it is, pages", "smoothed, one pool", "summed over time, prompt and generated", "last hit, pages")
LOOKING = (
    "all queries, prompt and generated",
    "maximum over heads, one pool",
    "logits' maximum, one pool",
    "softmax over candidates, pages",
)
CASES = [(name, setting) for name in ARGUMENTS for setting in (*EACH, *(LOOKING if name != "lag" else ()))]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_the_runtime_keeps_what_the_oracle_keeps(name: str, setting: str) -> None:
    assert check_scorer(name, setting, **ARGUMENTS[name]) > 0


@pytest.mark.parametrize("setting", EACH)
def test_cosines_go_some_rows_at_a_time(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "AT_ONCE", 200)
    assert check_scorer("key-similarity", setting, above=0.1) > 0
