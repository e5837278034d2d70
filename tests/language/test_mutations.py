"""Whatever bytes arrive, loading gives a policy or a PolicyError with places, and soon."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpolicy.errors import PolicyError
from kvpolicy.language import Policy, loads_policy
from kvpolicy.language.library import decode

TEXTS = [path.read_bytes() for path in sorted((Path(__file__).parent / "valid").glob("*.yaml"))]
LINES = sorted({line for text in TEXTS for line in text.splitlines(keepends=True)})
PIECES = [
    *(
        b"\n",
        b"\t",
        b"  ",
        b": ",
        b"- ",
        b",",
        b"{",
        b"}",
        b"[",
        b"]",
        b"(",
        b")",
        b'"',
        b"'",
        b"#",
        b"|",
        b">",
        b"%",
        b"*a",
    ),
    *(
        b"&a ",
        b"!!int ",
        b"<<: ",
        b"---\n",
        b"null",
        b"true",
        b"~",
        b"0",
        b"-1",
        b"1e30",
        b"50%",
        b"4k",
        b"t",
        b"layer",
    ),
    *(
        b" // 0",
        b" / t",
        b"size(prompt)",
        b"cos(t)",
        b"prompt",
        b"all",
        b"sum",
        b"last",
        b"\x00",
        b"\xff",
        b"\xc3\xa9",
        b"\r",
    ),
    *(b"extends: raas\n", b"extends: ./x.yaml\n", b"value: 3", b"word", b"kind", b"every-step", b"0..1", b"{first: 3}"),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid text with a few cuts, copies, lines moved in from elsewhere, and pieces of syntax put in."""
    text = bytearray(draw(st.sampled_from(TEXTS)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 2, 5, 12, 40, 200])))
        new = draw(st.one_of(st.just(b""), st.sampled_from(PIECES), st.sampled_from(LINES), st.binary(max_size=3)))
        text[start:end] = new
    return bytes(text)


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
