"""A suggested policy: it loads, its own test holds, it runs, and its numbers are those that were seen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvpolicy import loads_policy
from kvpolicy.errors import UsageError
from kvpolicy.lab.analyze.facts import PARTS, Facts, Times, facts
from kvpolicy.lab.analyze.reading import passage, read
from kvpolicy.lab.analyze.rules import Rules
from kvpolicy.lab.analyze.suggest import Derived, suggestion
from kvpolicy.lab.analyze.summary import Analysis
from kvpolicy.lab.running import Request, run_policy
from kvpolicy.language import Policy
from kvpolicy.models import load_model
from kvpolicy.models.tiny.task import make_problem
from kvpolicy.testing.runner import run_tests

RULES = Rules(local=8, silence=24)
NOBODY = Times(*(np.zeros(0, dtype=int) for _ in range(5)))


@pytest.fixture(scope="module")
def seen() -> Facts:
    model, tokenizer = load_model("builtin:tiny", device="cpu")
    problem = make_problem(0)
    text = passage(tokenizer, "a problem", Request(problem.prompt), " ".join(problem.answer(200)))
    return facts(text.name, text.prompt, read(model, text, RULES), RULES.local, 2)


def analysis(*texts: Facts) -> Analysis:
    return Analysis("builtin:tiny", RULES, (0, 1), (0, 1), texts)


def policy_of(found: Analysis, name: str = "mine") -> Policy:
    text = suggestion(found, name)
    assert max(map(len, text.splitlines())) <= 120
    return loads_policy(text)


def value(policy: Policy, param: str) -> float:
    return float(policy.params[param].default.text.rstrip("%"))


def test_it_says_what_was_seen(seen: Facts) -> None:
    derived = Derived(analysis(seen))
    policy = policy_of(analysis(seen), "for my model!")
    assert policy.name == "for-my-model"
    assert value(policy, "budget") >= np.quantile(seen.in_use, 0.95) + max(8, np.quantile(seen.pauses.queries, 0.95))
    assert value(policy, "budget") % 16 == 0
    assert value(policy, "every") <= value(policy, "budget") / 8
    assert value(policy, "window") == RULES.local
    assert derived.whole_prompt
    assert policy.pools["prompt"].budget is None


def test_its_own_test_holds(seen: Facts) -> None:
    results = list(run_tests(policy_of(analysis(seen))))
    assert results
    assert all(result.passed for result in results), results


def test_it_runs_and_evicts(seen: Facts) -> None:
    model, tokenizer = load_model("builtin:tiny", device="cpu")
    outcome = run_policy(
        model, tokenizer, "builtin:tiny", policy_of(analysis(seen)), Request(make_problem(3).prompt, 400)
    )
    assert outcome.evicted > 0
    assert outcome.resident_peak <= outcome.resident_bound


def test_a_prompt_that_nobody_comes_back_to_is_cut_and_its_sinks_are_pinned(seen: Facts) -> None:
    quiet = replace(
        seen, woken=np.zeros((2, 2)), asked=np.full((2, 2), 0.22), last_sink=np.array([[3, 3, -1, -1], [0, 1, 2, 3]])
    )
    policy = policy_of(analysis(quiet))
    assert value(policy, "share") == 25
    prompt = policy.pools["prompt"]
    assert prompt.budget is not None
    assert prompt.budget.text == "max(16, 25% * prompt_len)"
    assert "pinned: {first: 4}" in suggestion(analysis(quiet), "mine")


def test_layers_without_a_busy_head_get_no_more_than_windows(seen: Facts) -> None:
    attention = seen.attention.copy()
    attention[1] = [float(name in ("sink", "window")) / 2 for name in PARTS]
    policy = policy_of(analysis(replace(seen, attention=attention)))
    assert [str(layer) for override in policy.overrides for layer in override.layers or ()] == ["1"]
    assert all(result.passed for result in run_tests(policy))


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        (lambda seen: {"in_use": seen.in_use + 160}, 160),
        (lambda seen: {"pauses": NOBODY, "in_use": seen.in_use * 0}, None),
    ],
)
def test_the_budget_follows_what_was_in_use(
    seen: Facts, change: Callable[[Facts], dict[str, Any]], moves: int | None
) -> None:
    before, after = (Derived(analysis(text)).budget for text in (seen, replace(seen, **change(seen))))
    assert after == (before + moves if moves else 32)  # the window, 16 to spare, rounded up


def test_texts_without_an_output_suggest_nothing(seen: Facts) -> None:
    alone = replace(seen, prompt=seen.length, lives=replace(seen.lives, token=seen.lives.token * 0))
    with pytest.raises(UsageError, match="longer outputs"):
        suggestion(analysis(alone), "mine")
