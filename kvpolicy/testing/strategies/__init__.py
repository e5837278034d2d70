"""Hypothesis strategies: policies from the whole language, and texts that a cache is told.

    @given(policies(supported=True), texts())
    def test_mine(policy: str, text: dict) -> None: ...

``policies`` gives YAML, ``texts`` the `attention:` of a test. Needs the extra `test` (hypothesis).
"""

from kvpolicy.testing.strategies.policies import policies
from kvpolicy.testing.strategies.texts import texts

__all__ = ["policies", "texts"]
