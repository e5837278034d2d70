"""Errors of stored numbers against the unquantised cache, on a real model; run with -s to see them."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from kvpolicy.lab import stored_error


@pytest.fixture(scope="module")
def rows() -> dict[int, dict[str, float]]:
    """What the command prints as JSON, by bits."""
    told = io.StringIO()
    arguments = ["builtin:tiny", "--set", "group=16", "--set", "residual=32", "--tokens", "160", "--json"]
    with contextlib.redirect_stdout(told):
        assert stored_error.main(arguments) == 0
    print(told.getvalue())
    return {row["bits"]: row for row in json.loads(told.getvalue())}


def test_no_number_is_off_by_more_than_half_a_step(rows) -> None:
    """Beyond that only what the dtype of the scale rounds: 2^-11 of 2^bits - 1 steps, and of the zero."""
    for bits, row in rows.items():
        assert row["stored_tokens"] > 100
        assert row["worst_in_steps"] <= 0.5 + 2**bits * 2**-10


def test_fewer_bits_cost_more_and_take_less(rows) -> None:
    by_bits = [rows[bits] for bits in (8, 4, 2)]
    for name in ("key_error", "value_error", "mean_kl"):
        assert by_bits[0][name] < by_bits[1][name] < by_bits[2][name]
    assert by_bits[0]["share"] > by_bits[1]["share"] > by_bits[2]["share"]
    assert by_bits[0]["key_error"] < 0.01 and by_bits[0]["mean_kl"] < 1e-3


def test_bytes_are_as_planned(rows) -> None:
    assert all(row["bytes"] == row["planned_bytes"] for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "raas"], "no pool of raas is stored"),
        (["--tokens", "20"], "nothing was stored"),
        (["--policy", "kiwi"], "kivi"),
    ],
)
def test_mistakes_are_told_in_a_sentence(capsys, arguments, said) -> None:
    assert stored_error.main(arguments) == 2
    assert said in capsys.readouterr().err
