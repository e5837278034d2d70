"""The `tests:` of every shipped policy hold, on the oracle and on the runtime, and there is no way around them."""

from __future__ import annotations

import pytest

from kvpolicy.language import Policy, load_policy
from kvpolicy.plan import make_plan
from kvpolicy.testing.feeding import Pass, RuntimeBeside
from kvpolicy.testing.patterns import synthesize
from kvpolicy.testing.runner import run_test
from tests.invariants.policies import thorough
from tests.policies.kit import FILES
from tests.policies.mutants import mutants

POLICIES = {name: load_policy(path) for name, path in FILES.items()}
CASES = [
    pytest.param(name, number, id=f"{name}-{test.name}".replace(" ", "_"))
    for name, policy in POLICIES.items()
    for number, test in enumerate(policy.tests)
]

SAME_HERE = {"prompt: scorer without memory"}
"""Changes that show in later prompt turns only, which a test does not have; see the last test below."""


@pytest.mark.parametrize(("name", "number"), CASES)
@pytest.mark.parametrize("runtime", [False, True], ids=["oracle", "runtime"])
def test_what_a_policy_claims_holds(name: str, number: int, runtime: bool) -> None:
    outcome = run_test(POLICIES[name], number, runtime=runtime)
    assert outcome.passed, f"\n{outcome}"
    assert outcome.near_ties == 0
    assert outcome.evicted > 0 or not any(pool.budget for pool in POLICIES[name].pools.values())


@pytest.mark.parametrize("name", thorough(POLICIES))
def test_every_change_of_an_answer_breaks_a_claim_and_every_claim_is_broken_by_one(name: str) -> None:
    policy = POLICIES[name]
    idle = {(number, claim) for number, test in enumerate(policy.tests) for claim in range(len(test.expect))}
    survivors = set()
    for what, mutant in mutants(policy).items():
        survivors.add(what)
        for number in range(len(mutant.tests)):
            waiting = any(test == number for test, _ in idle)
            if waiting or what in survivors:  # else there is nothing to learn
                failures = run_test(mutant, number, first=not waiting).failures
                idle -= {(number, failure.claim) for failure in failures}
                survivors -= {what} if failures else set()
    assert survivors <= SAME_HERE
    assert not idle, "; ".join(f"{policy.tests[n].name}: {policy.tests[n].expect[c]}" for n, c in sorted(idle))


@pytest.mark.parametrize("name", ["scope-slide", "scope-adaptive", "scope-discontinuous"])
def test_scopes_prompt_scores_are_remembered_over_turns(name: str) -> None:
    """The prompt is compressed again when a later turn has been read, by all that has been asked of it so far."""
    said = synthesize({"pattern": "milestone", "prompt": 40, "steps": 0, "at": "0..7", "until": 19, "layers": 1})
    turns = [Pass("prompt", (slice(0, 20),)), Pass("prompt", (slice(20, 40),))]

    def left(policy: Policy) -> list[frozenset[int]]:
        plan = make_plan(policy.bind(alpha=12, alpha2=4), said.geometry, prompt=40, max_new_tokens=9, turns=2)
        feed = RuntimeBeside(plan)
        return [feed.feed(said, turn)[0].heads[0]["prompt"].kept for turn in turns]

    first, milestones = frozenset({*range(8), *range(16, 20)}), frozenset(range(8))
    assert left(POLICIES[name]) == [first, milestones | {*range(36, 40)}]
    one, other = left(mutants(POLICIES[name])["prompt: scorer without memory"])
    assert one == first and not other & milestones
