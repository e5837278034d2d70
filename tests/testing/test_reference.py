"""The page on tests is read off the code, and its pictures show what its words say."""

from __future__ import annotations

import pytest

from kvpolicy.testing.arguments import known
from kvpolicy.testing.claims import CLAIMS
from kvpolicy.testing.patterns import PATTERNS
from kvpolicy.testing.patterns.generators import EXAMPLES
from kvpolicy.testing.patterns.shape import Shape
from kvpolicy.testing.reference import picture, render_claims, render_patterns


def drawn(name: str) -> dict[int, str]:
    """Query -> its line, a letter a token."""
    example = f"{{pattern: {name}{', ' if EXAMPLES[name] else ''}{EXAMPLES[name]}}}"
    lines = [line.split() for line in list(picture(example))[1:]]
    assert all(len(shades) == int(query) + 1 for _, query, shades in lines)
    return {int(query): shades for _, query, shades in lines}


def test_every_pattern_and_claim_has_a_section_with_its_arguments() -> None:
    patterns, claims = render_patterns(), render_claims()
    assert [line[4:] for line in patterns.splitlines() if line.startswith("### ")] == list(PATTERNS)
    assert [line[4:] for line in claims.splitlines() if line.startswith("### ")] == sorted(CLAIMS)
    for name in PATTERNS:
        section = patterns.split(f"### {name}\n")[1].split("### ")[0]
        assert all(f"| `{argument}` |" in section for argument in known(PATTERNS[name]))


@pytest.mark.parametrize("name", PATTERNS)
def test_no_argument_of_a_pattern_clashes_with_what_all_patterns_or_parts_take(name: str) -> None:
    assert not {*known(PATTERNS[name])} & {*known(Shape), "pattern", "where", "trace"}


def test_pictures_show_what_the_words_say() -> None:
    milestone, burst, needle, lost = drawn("milestone"), drawn("burst"), drawn("needle"), drawn("adversarial")
    assert milestone[20][9] == "█" and milestone[23][9] == "·"
    assert [burst[query][5] for query in (8, 11, 14, 17, 20, 23)] == ["·", "█"] * 3
    assert needle[11][3:5] == "██" and needle[14][3:5] != "██"
    assert lost[20][9:13] == "·██·" and lost[20].count("█") == 2
    assert all(set(line) == {"▒"} for line in drawn("uniform").values())
