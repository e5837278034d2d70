"""YAML as it is read here: version 1.2, data only, bounded, with places."""

from __future__ import annotations

import time

import pytest

from kvpolicy.errors import PolicyError
from kvpolicy.language.library import decode, fetch, shipped_policies
from kvpolicy.language.nodes import typed
from kvpolicy.language.reader import MAX_CHARACTERS, read


def value(text: str) -> object:
    return typed(read(f"key: {text}\n", "f").data())["key"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("1e-3", 0.001),
        ("12", 12),
        ("-3", -3),
        ("012", 12),
        ("0o14", "0o14"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x1F", "0x1F"),
        (".5", 0.5),
        ("50%", "50%"),
        ('"12"', "12"),
        ("'true'", "true"),
        ("~", None),
        ("null", None),
        ("9" * 30, float("9" * 30)),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, expected):
    assert value(text) == expected
    assert type(value(text)) is type(expected)


@pytest.mark.parametrize(
    ("text", "offset", "place"),
    [
        ("a: 1 + x", 4, (1, 8)),
        ("a: '1 + x'", 4, (1, 9)),
        ('a: "1 + x"', 4, (1, 9)),
        ('a: "1\\t+ x"', 4, (1, 10)),
        ("a: >\n  1 +\n  x", 4, (3, 3)),
        ("a: |-\n  1 +\n\n  x", 5, (4, 3)),
        ("a: 1 +\n   x", 4, (2, 4)),
        ("a: 1 + x\r\nb: 2", 4, (1, 8)),
        ("a: 1 +", 3, (1, 7)),
    ],
)
def test_characters_of_a_scalar_are_found_in_the_file(text, offset, place):
    span = read(text, "f").content["a"].part(offset)
    assert (span.line, span.column) == place


@pytest.mark.parametrize(
    "text",
    [
        "[" * 60_000,
        "{" * 60_000,
        "- " * 30_000,
        "? " * 30_000,
        "a:\n" * 20_000,
        "[" + "a," * 32_000 + "]",
        '"' * 60_000,
        "a: &a [1]\n" + "b: [*a, *a]\n" * 1000,
        "x" * (MAX_CHARACTERS + 1),
    ],
    ids=lambda text: text[:6].strip(),
)
def test_bombs_are_refused_soon(text):
    begun = time.process_time()
    try:
        read(text, "f")
    except PolicyError as error:
        assert error.diagnostics
    assert time.process_time() - begun < 20  # a bound against hanging, not a measurement


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "~"])
def test_an_empty_file(text):
    with pytest.raises(PolicyError, match="nothing is here"):
        read(text, "f")


def test_a_byte_order_mark_is_no_character():
    assert read("\ufeffa: 1", "f").data() == {"a": "1"}


def test_what_is_not_utf8_is_placed():
    with pytest.raises(PolicyError) as caught:
        decode(b"kvpolicy: 1\nname: caf\xe9\n", "f.yaml")
    assert caught.value.diagnostics[0].place == "f.yaml:2:10"
    assert "byte 0xE9 is not UTF-8" in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    for reference in (tmp_path / "none.yaml", tmp_path, "./none.yaml", "a\0b.yaml"):
        with pytest.raises(PolicyError, match="cannot be read"):
            fetch(reference)


def test_shipped_names_and_near_ones():
    assert "raas" in shipped_policies()
    assert fetch("raas")[1].endswith("raas.yaml")
    with pytest.raises(PolicyError, match="did you mean `raas`"):
        fetch("rass")


def test_a_policy_from_standard_input(monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"kvpolicy: 1\n")))
    assert fetch("-") == ("kvpolicy: 1\n", "<stdin>")
