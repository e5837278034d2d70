"""The tables and references in the pages are those that the code would write now."""

import pytest

from kvpolicy.cli.pages import PART, PARTS, pages, refreshed


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_generated_parts_are_current(page):
    text = page.read_text(encoding="utf-8")
    assert refreshed(text) == text, "stale: run python -m kvpolicy.cli.pages"


def test_every_part_is_in_some_page():
    marks = {part["name"] for page in pages() for part in PART.finditer(page.read_text(encoding="utf-8"))}
    assert marks == set(PARTS)
