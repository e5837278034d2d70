"""A policy run on a text, and claims about it in Python: one line each, one method for each claim of the language."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpolicy.errors import UsageError
from kvpolicy.language import Policy, load_policy
from kvpolicy.language.base import Complaint
from kvpolicy.plan import Plan
from kvpolicy.testing.claims import CLAIMS, Claim
from kvpolicy.testing.expectations import read_claim
from kvpolicy.testing.explaining import explain
from kvpolicy.testing.feeding import Feed, OracleAlone, RuntimeBeside, plan_for, watch
from kvpolicy.testing.patterns import Attention
from kvpolicy.testing.seen import Seen
from kvpolicy.testing.traces import text_of


@dataclass(frozen=True)
class PolicyRun:
    """What a policy did with a text. Every claim of a ``tests:`` block is a method, with the same arguments:

    ``run.keeps(40, until=90)``, ``run.evicts("8..11", by=150)``, ``run.resident(max=64)``, ``run.resident(is_=8)``.
    It raises AssertionError at the first moment where it does not hold, and says what was kept then and why; else it
    returns the run, so that claims can follow one another.

    ``seen`` holds every layer, row and KV head after every pass.
    """

    plan: Plan
    said: Attention
    seen: tuple[Seen, ...]
    near_ties: int

    @property
    def evicted(self) -> int:
        """Tokens that left, over rows, layers and KV heads: 0 means that the policy never fired."""
        return sum(len(pool.evicted) for seen in self.seen for pool in seen.step.heads[seen.head].values())

    def __getattr__(self, name: str) -> Callable[..., PolicyRun]:
        if name not in CLAIMS:
            raise AttributeError(f"no claim is called {name!r}; known are {', '.join(CLAIMS)}")

        def claim(*main: Any, **arguments: Any) -> PolicyRun:
            __tracebackhide__ = True
            self._hold(name, self._read(name, main, arguments), main, arguments)
            return self

        claim.__name__, claim.__doc__ = name, CLAIMS[name].__doc__
        return claim

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *CLAIMS]

    def _read(self, name: str, main: tuple[Any, ...], arguments: Mapping[str, Any]) -> Claim:
        __tracebackhide__ = True
        if len(main) > 1:
            raise TypeError(f"{name} takes one positional argument, `{CLAIMS[name].MAIN}`, and others by name")
        written = {key.removesuffix("_"): _plain(value) for key, value in arguments.items()}
        if main:
            written[CLAIMS[name].MAIN] = _plain(main[0])
        try:
            return read_claim({name: written}, self.plan, self.said.length)
        except Complaint as complaint:
            raise UsageError(f"{_call(name, main, arguments)}: {_said(complaint)}") from None

    def _hold(self, name: str, claim: Claim, main: tuple[Any, ...], arguments: Mapping[str, Any]) -> None:
        __tracebackhide__ = True
        for seen in self.seen:
            breach = claim.judge(seen) if claim.about(seen) else None
            if breach is not None:
                lines = [f"{self.plan.policy.name}: {_call(name, main, arguments)}: {breach.reason}"]
                raise AssertionError("\n  ".join([*lines, *explain(seen, breach.tokens)]))


def run_policy(
    policy: Policy | str | Path,
    attention: Mapping[str, Any],
    /,
    *,
    runtime: bool = False,
    compiled: bool = False,
    **params: object,
) -> PolicyRun:
    """Run a policy on a text.

    Args:
        policy: one that is loaded, or what ``load_policy`` takes.
        attention: a pattern with its arguments, or a trace, as in a test's ``attention``; paths of traces start in the
            working folder.
        runtime: through the runtime beside the oracle (which imports torch); ``compiled``: its generated passes are.
        params: values of the policy's params.

    Raises:
        PolicyError, UsageError: the policy, or the text, makes no sense, or the runtime cannot run it yet.
        Disagreement: the runtime does not keep what the oracle keeps.
    """
    loaded = policy if isinstance(policy, Policy) else load_policy(policy)
    bound = loaded.bind(**params) if params else loaded
    try:
        said = text_of(attention, near="", plan_of=lambda text: plan_for(bound, text))
    except Complaint as complaint:
        raise UsageError(f"attention: {_said(complaint)}") from None
    plan = plan_for(bound, said)
    feed: Feed = RuntimeBeside(plan, compiled=compiled) if runtime or compiled else OracleAlone(plan)
    seen = tuple(watch(feed, said))
    return PolicyRun(plan, said, seen, feed.near_ties)


def _plain(value: Any) -> Any:
    """Ranges and sets of positions as lists."""
    return sorted(value) if isinstance(value, range | set | frozenset) else value


def _call(name: str, main: tuple[Any, ...], arguments: Mapping[str, Any]) -> str:
    given = [*map(repr, main), *(f"{key}={value!r}" for key, value in arguments.items())]
    return f"{name}({', '.join(given)})"


def _said(complaint: Complaint) -> str:
    return "; ".join(filter(None, (complaint.reason, complaint.hint)))
