"""A corpus of mistakes: each file of malformed/ says in its first lines what must be found in it, and nothing else.

A line `# 7:13: reason | hint` expects a diagnostic there; one in another file names it first. `# set: name=value` sets
a param. To add a case, write the file, run this test, and judge what it prints.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvpolicy.errors import Diagnostic, PolicyError
from kvpolicy.language import load_policy

FOLDER = Path(__file__).parent / "malformed"
CASES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
EXPECTED = re.compile(r"# (?P<place>(?:\S+:)?[0-9]+:[0-9]+): (?P<told>.+)")


def header(case: str) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """The (place, reason and hint) of each expected diagnostic, and the values to set."""
    expected, values = [], {}
    for line in (FOLDER / f"{case}.yaml").read_text().splitlines():
        if match := EXPECTED.fullmatch(line):
            expected.append((match["place"], match["told"]))
        elif line.startswith("# set: "):
            name, _, value = line.removeprefix("# set: ").partition("=")
            values[name] = value
    return expected, values


def found(case: str, values: dict[str, str]) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        load_policy(f"./{case}.yaml", values)
    return caught.value


def told(diagnostic: Diagnostic) -> str:
    return f"{diagnostic.reason} | {diagnostic.hint}" if diagnostic.hint else diagnostic.reason


@pytest.mark.parametrize("case", CASES)
def test_right_place_right_reason(case, monkeypatch):
    monkeypatch.chdir(FOLDER)
    expected, values = header(case)
    error = found(case, values)
    places = [item.place.removeprefix(f"{case}.yaml:") for item in error.diagnostics]
    assert [(place, told(item)) for place, item in zip(places, error.diagnostics, strict=True)] == expected
    assert error.exit_code == 3
    for item in error.diagnostics:
        assert item.snippet and 1 <= item.column <= len(item.snippet) + 1 and item.width >= 1
        assert f"{item.place}: {item.reason}" in str(error) and "^" * min(item.width, 60) in str(error)
    assert "Traceback" not in str(error) and "pydantic" not in str(error)


def test_the_corpus_is_large_and_each_mistake_has_words_of_its_own():
    assert len(CASES) >= 80
    said: dict[str, str] = {}
    for case in CASES:
        for words in {told for _, told in header(case)[0]} if case != "several-mistakes-together" else ():
            assert said.setdefault(words, case) == case, f"{said[words]} and {case} both say: {words}"


def test_a_diagnostic_underlines_what_it_is_about(monkeypatch):
    monkeypatch.chdir(FOLDER)
    text = str(found("expression-unknown-name", {}))
    assert text.splitlines() == [
        "expression-unknown-name.yaml:7:18: the name `prompt_length` is unknown",
        "    7 |     budget: 64 + prompt_length",
        "      |                  ^^^^^^^^^^^^^",
        "      = did you mean `prompt_len`?",
    ]


def test_a_long_line_is_cropped_around_the_place():
    item = Diagnostic("f", 1, 300, "why", "", "x" * 299 + "HERE" + "y" * 299, 4)
    _, line, carets = str(item).splitlines()
    assert len(line) < 140 and line[carets.index("^") :].startswith("HERE") and carets.count("^") == 4


def test_control_characters_do_not_reach_the_terminal():
    with pytest.raises(PolicyError) as caught:
        load_policy(str(FOLDER / "top-pools-empty.yaml"), {"\x1b[31m": "\x1b[0m"})
    assert "\x1b" not in str(caught.value)
