"""Hypothesis strategies: policies from the whole language, and texts that a cache is told.

    @given(policies(supported=True), texts())
    def test_mine(policy: str, text: dict) -> None: ...

``policies`` gives YAML, ``texts`` the `attention:` of a test. Needs the extra `test` (hypothesis); what they are made
of does not: ``draw_policy`` and ``draw_text`` take any source of whole numbers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from kvpolicy.errors import MissingExtra
from kvpolicy.testing.strategies.policies import draw_policy
from kvpolicy.testing.strategies.texts import Text, draw_text

try:
    from hypothesis import assume
    from hypothesis import strategies as st
except ImportError:
    raise MissingExtra("drawing policies needs hypothesis: pip install 'kvpolicy[test]'") from None

__all__ = ["policies", "texts"]

integers = lru_cache(maxsize=1024)(st.integers)


@st.composite
def policies(draw: Any, *, supported: bool = False) -> str:
    """Valid policies from the whole language, as YAML.

    supported: only such as the runtime runs (``plan.unsupported`` decides).
    """
    text = draw_policy(lambda low, high: draw(integers(low, high)), supported=supported)
    assume(text is not None)
    assert text is not None
    return text


@st.composite
def texts(draw: Any, *, longest: int = 24) -> Text:
    """The `attention:` mapping of a test: a few rows of at most ``longest`` prompt tokens, as many generated ones."""
    return draw_text(lambda low, high: draw(integers(low, high)), longest=longest)
