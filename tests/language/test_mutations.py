"""Whatever bytes arrive, loading gives a policy or a PolicyError with places, and soon."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpolicy.errors import PolicyError
from kvpolicy.language import Policy, loads_policy
from kvpolicy.language.library import decode
from kvpolicy.testing.mutated import lines_of, mutate

TEXTS = [path.read_bytes() for path in sorted((Path(__file__).parent / "valid").glob("*.yaml"))]
LINES = lines_of(TEXTS)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid text, disturbed."""
    return mutate(lambda low, high: draw(st.integers(low, high)), TEXTS, LINES)


def load(data: bytes) -> Policy:
    return loads_policy(decode(data, "mutated.yaml"), "mutated.yaml")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(mutated())
def test_a_mutated_policy_loads_or_says_why_not(data):
    try:
        policy = load(data)
    except PolicyError as error:
        assert error.diagnostics
        for item in error.diagnostics:
            assert item.reason and item.line >= 1 and item.column >= 1, item
            assert item.place in str(error)
        return
    assert loads_policy(policy.to_yaml()) == policy
    for layer in range(4):
        try:
            policy.pools_for(layer, 4, 0)
        except PolicyError as error:
            assert "override" in str(error)
