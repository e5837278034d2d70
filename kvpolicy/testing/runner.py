"""Runs the ``tests:`` of a policy: its attention through the oracle, or through the runtime beside it, then its claims.

The oracle needs no torch. With ``runtime`` the same queries and keys go through a runtime cache as well, which must
keep what the oracle keeps after every pass (see agreement.py); the claims are then judged by what the runtime kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpolicy.errors import Diagnostic, KvpolicyError, PolicyError
from kvpolicy.language import Policy
from kvpolicy.language.base import Complaint
from kvpolicy.language.policy import PolicyTest
from kvpolicy.plan import Plan
from kvpolicy.testing.arguments import within
from kvpolicy.testing.claims import Breach, Claim
from kvpolicy.testing.expectations import read_claim
from kvpolicy.testing.explaining import explain
from kvpolicy.testing.feeding import Feed, OracleAlone, RuntimeBeside, plan_for, watch
from kvpolicy.testing.patterns import Attention
from kvpolicy.testing.seen import Seen
from kvpolicy.testing.traces import text_of


@dataclass(frozen=True)
class Failure:
    """The first moment at which a claim did not hold: number ``claim`` of its test, what was seen, and why."""

    claim: int
    seen: Seen
    place: Diagnostic
    details: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([str(self.place), *(f"  {line}" for line in self.details)])


@dataclass(frozen=True)
class Outcome:
    """How a test went.

    ``evicted`` counts the tokens that left, over rows, layers and KV heads: 0 means that the policy never fired.
    ``near_ties`` counts the runtime's choices that float32 cannot tell from the oracle's.
    """

    policy: str
    test: PolicyTest
    failures: tuple[Failure, ...]
    evicted: int
    near_ties: int = 0

    @property
    def passed(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        if self.passed:
            return f"{self.policy}: {self.test.name}: holds ({self.evicted} tokens evicted)"
        return "\n".join(str(failure) for failure in self.failures)


@dataclass(frozen=True)
class Case:
    """One test of a policy, read: the plan under the params it sets, what is said, and what is claimed."""

    policy: Policy
    number: int
    plan: Plan
    said: Attention
    claims: tuple[Claim, ...]

    @classmethod
    def read(cls, policy: Policy, number: int) -> Case:
        """Read test ``number``. Raises PolicyError, with the place of every mistake, where it makes no sense."""
        test, where = policy.tests[number], ("tests", number)
        try:
            with within("attention"):
                said = text_of(test.attention, near=policy.source, plan_of=lambda text: planned(policy, test, text))
            plan = planned(policy, test, said)
        except Complaint as complaint:
            raise PolicyError(diagnostics=[policy.diagnostic(where, complaint)]) from None
        claims, mistakes = [], []
        for index, written in enumerate(test.expect):
            try:
                claims.append(read_claim(written, plan, said.length))
            except Complaint as complaint:
                mistakes.append(policy.diagnostic((*where, "expect", index), complaint))
        if mistakes:
            raise PolicyError(diagnostics=mistakes)
        return cls(policy, number, plan, said, tuple(claims))

    def failure(self, claim: int, breach: Breach, seen: Seen) -> Failure:
        name = self.policy.tests[self.number].name
        place = self.policy.diagnostic(("tests", self.number, "expect", claim), Complaint(f"{name}: {breach.reason}"))
        return Failure(claim, seen, place, tuple(explain(seen, breach.tokens)))


def planned(policy: Policy, test: PolicyTest, said: Attention) -> Plan:
    """The plan of a policy under a test's params. Raises Complaint where there is none for this text."""
    try:
        return plan_for(policy.bind(**test.set), said)
    except KvpolicyError as error:
        mistakes = error.diagnostics if isinstance(error, PolicyError) else ()
        reason, hint = (mistakes[0].reason, mistakes[0].hint) if mistakes else (str(error), "")
        raise Complaint(f"no plan for this test: {reason}", hint, ("set" if test.set else "attention",)) from None


def run_tests(policy: Policy, *, runtime: bool = False) -> list[Outcome]:
    """Run all tests of a policy, in their order; see ``run_test``."""
    return [run_test(policy, number, runtime=runtime) for number in range(len(policy.tests))]


def run_test(
    policy: Policy, number: int, *, runtime: bool = False, compiled: bool = False, first: bool = False
) -> Outcome:
    """Run test ``number`` of a policy.

    Args:
        runtime: through the runtime too (which imports torch).
        compiled: through the runtime, its generated passes compiled (seconds).
        first: stop at the first failure; otherwise every claim is followed to its own.

    Raises:
        PolicyError: the test makes no sense; every mistake found, with its place.
        UsageError: the runtime cannot run this policy yet.
        Disagreement: the runtime does not keep what the oracle keeps.
    """
    case = Case.read(policy, number)
    feed: Feed = RuntimeBeside(case.plan, compiled=compiled) if runtime or compiled else OracleAlone(case.plan)
    failures: dict[int, Failure] = {}
    evicted = 0
    for seen in watch(feed, case.said):
        if len(failures) == len(case.claims) or (first and failures):
            break
        evicted += sum(len(pool.evicted) for pool in seen.step.heads[seen.head].values())
        for index, claim in enumerate(case.claims):
            breach = claim.judge(seen) if index not in failures and claim.about(seen) else None
            if breach is not None:
                failures[index] = case.failure(index, breach, seen)
    ordered = tuple(failures[index] for index in sorted(failures))
    return Outcome(policy.name, policy.tests[number], ordered, evicted, feed.near_ties)
