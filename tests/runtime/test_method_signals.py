"""The torch recipes of Keyformer's, Scissorhands' and LagKV's signals beside the oracle's, under a few settings."""

from __future__ import annotations

from typing import Any

import pytest

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
