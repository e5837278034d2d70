"""Tests of policies that make no sense: what is said, and where it points."""

from __future__ import annotations

import pytest

from kvpolicy.errors import Diagnostic, PolicyError
from kvpolicy.language import Policy
from kvpolicy.testing.runner import run_test
from tests.testing.kit import TEXT, WINDOW, policy

WRONG = [
    ("{keep: 3}", "keep", "`keep` is no claim", "did you mean `keeps`?"),
    ("{stays: 3}", "stays", "`stays` is no claim", "known here: `evicts`"),
    ("{keeps: 3, evicts: 4}", "evicts", "one claim at a time", ""),
    ("{keeps: 3, untill: 4}", "untill", "`untill` is not an argument here", "did you mean `until`?"),
    ("{keeps: {token: 3}}", "token", "`token` is not an argument here", "did you mean `tokens`?"),
    ("{keeps: {until: 9}}", "{until: 9}", "the argument `tokens` is missing", "known here: `pool`"),
    ("{keeps: promt}", "promt", "`promt` is neither positions nor a word for them", "did you mean `prompt`?"),
    ("{keeps: 3.5}", "3.5", "`3.5` is no position", "`8..11` (both included)"),
    ("{keeps: 16}", "16", "position 16 is never said", "0..15"),
    ("{keeps: window}", "window", "`window` and `of` need each other", "as in `{keeps: window, of: 8}`"),
    ("{keeps: 3, of: 8}", "3", "`window` and `of` need each other", ""),
    ("{keeps: window, of: 0}", "0", "a window of no tokens", ""),
    ("{keeps: 7, until: 6}", "6", "at 6, position 7 has not been said", "`until` is later"),
    ("{keeps: {tokens: 7, until: 16}}", "16", "position 16 is never said", ""),
    ("{keeps: 7, until: soon}", "soon", "`soon` is not a whole number from 0", ""),
    ("{evicts: 7, by: 6}", "6", "at 6, position 7 has not been said", "`by` is later"),
    ("{evicts: prompt}", "prompt", "`prompt` is no position", ""),
    ("{resident: {}}", "{}", "how many?", "`{resident: {max: 64}}`"),
    ("{resident: {max: 4 +}}", "}", "a number, a name or `(` expected, but the expression ends here", ""),
    ("{resident: {max: 4 + sise}}", "sise", "`sise` has no value here", "known here"),
    ("{resident: {max: 4, pool: al}}", "al", "no pool is called `al`", "did you mean `all`?"),
    ("{peak: {max: 4, head: 2}}", "2", "there is no such head: the last is 1", ""),
    ("{peak: {max: 4, layer: [0, 2]}}", "[0, 2]", "there is no such layer: the last is 1", ""),
    ("{peak: {max: 4, row: 1}}", "1", "there is no such row: the last is 0", ""),
    ("{updates: {}}", "{}", "when?", "`{updates: {every: 8}}`"),
    ("{updates: {every: 3, at: [7]}}", "{every: 3, at: [7]}", "when?", ""),
    ("{mass: {}}", "{}", "how much?", "`{mass: {min: 0.9}}`"),
    ("{mass: 90}", "90", "`90` is not a share", "as in `0.9` or `90%`"),
    ("{mass: {min: 101%}}", "101%", "`1.01` is not a share", "from 0 to 1"),
    ("{mass: {mean: most%}}", "most%", "`most%` is not a share", ""),
    ("{mass: {max: -0.1}}", "-0.1", "`-0.1` is not a share", ""),
    ("{mass: {min: true}}", "true", "`True` is not a share", ""),
    ("{mass: {min: 0.9, mid: 0.5}}", "mid", "`mid` is not an argument here", "did you mean `min`?"),
    ("{mass: 0.9, until: 16}", "16", "position 16 is never said", "0..15"),
    ("{mass: {min: 0.9, from: 9, until: 8}}", "8", "at 8, position 9 has not been said", "`until` is later"),
    ("{mass: {min: 0.9, head: 2}}", "2", "there is no such head: the last is 1", ""),
    ("{order: 3}", "3", "an order needs at least two different tokens", ""),
    ("{order: [3, 3]}", "[3, 3]", "an order needs at least two different tokens", ""),
    ("{order: [3, 99]}", "[3, 99]", "position 99 is never said", ""),
]  # fmt: skip


def mistake_in(made: Policy) -> tuple[str, Diagnostic]:
    """What is underlined, and the one mistake."""
    with pytest.raises(PolicyError) as caught:
        run_test(made, 0)
    (mistake,) = caught.value.diagnostics
    return mistake.snippet[mistake.column - 1 :][: mistake.width], mistake


@pytest.mark.parametrize(("claim", "culprit", "reason", "hint"), WRONG, ids=[claim for claim, *_ in WRONG])
def test_what_makes_no_sense_is_shown_at_its_place(claim: str, culprit: str, reason: str, hint: str) -> None:
    underlined, mistake = mistake_in(policy(WINDOW, claim))
    assert (mistake.reason, underlined) == (reason, culprit)
    assert hint in mistake.hint
    assert (mistake.file, mistake.line) == ("test.yaml", 9)


def test_all_mistakes_of_a_test_are_shown_at_once() -> None:
    with pytest.raises(PolicyError) as caught:
        run_test(policy(WINDOW, "{keep: 3}, {resident: 4}, {evicts: 99}"), 0)
    assert [mistake.reason for mistake in caught.value.diagnostics] == [
        "`keep` is no claim",
        "position 99 is never said",
    ]


@pytest.mark.parametrize(
    ("attention", "culprit", "reason"),
    [
        ("{pattern: sinc, steps: 9}", "sinc", "no pattern is called `sinc`"),
        ("{pattern: sink, stps: 9}", "stps", "`stps` is not an argument here"),
        ("{pattern: sink, heads: 5}", "5", "5 query heads cannot share 2 KV heads evenly"),
        ("{pattern: milestone}", "{pattern: milestone}", "the argument `at` is missing"),
        ("{trace: none.safetensors}", "none.safetensors", "there is no file `none.safetensors`"),
    ],
)
def test_attention_that_makes_no_sense_is_shown_at_its_place(attention: str, culprit: str, reason: str) -> None:
    underlined, mistake = mistake_in(policy(WINDOW, "{keeps: all}", attention))
    assert (mistake.reason, underlined, mistake.line) == (reason, culprit, 8)


def test_a_claim_about_a_prompt_needs_one() -> None:
    with pytest.raises(PolicyError, match="there is no prompt"):
        run_test(policy(WINDOW, "{keeps: prompt}", "{pattern: uniform, prompt: 0, steps: 9}"), 0)


def test_a_test_whose_params_make_no_plan_says_so() -> None:
    top = "params: {tokens: {default: 9, help: tokens kept}}\ntotal: tokens"
    made = policy("prompt: {admit: prompt}\nrest: {admit: generated, budget: tokens - 4}", "{keeps: prompt}", TEXT, top)
    with pytest.raises(PolicyError, match="no plan for this test: test keeps at most 9 tokens in all"):
        run_test(made, 0)
