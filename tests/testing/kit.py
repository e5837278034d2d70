"""What the tests of claims share: a policy with one test."""

from __future__ import annotations

from textwrap import dedent, indent

from kvpolicy.language import Policy, loads_policy

WINDOW = "all: {admit: all, budget: 4}"
"""With a prompt of 6 tokens, position p >= 2 leaves at position p + 4; 0 and 1 leave at the prompt's end, 5."""

TEXT = "{pattern: uniform, prompt: 6, steps: 10}"


def policy(pools: str, claims: str, attention: str = TEXT, top: str = "") -> Policy:
    lines = f"kvpolicy: 1\nname: test\n{dedent(top)}\npools:\n{indent(dedent(pools).strip(), '  ')}\n"
    return loads_policy(f"{lines}tests:\n- name: claim\n  attention: {attention}\n  expect: [{claims}]\n", "test.yaml")
