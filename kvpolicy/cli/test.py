"""`kvpolicy test`: do the claims in a policy's `tests:` hold, and if not, at which step and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from kvpolicy.cli import output
from kvpolicy.cli.arguments import Json
from kvpolicy.cli.junit import junit
from kvpolicy.cli.words import plural
from kvpolicy.errors import KvpolicyError, PolicyError, UsageError
from kvpolicy.language import Policy, load_policy, shipped_policies

if TYPE_CHECKING:
    from kvpolicy.testing.runner import Outcome

EPILOG = (
    "Examples: kvpolicy test my-policy.yaml; kvpolicy test raas -k 'milestone and not phoenix'; kvpolicy test "
    "my-policy.yaml --runtime --junitxml results.xml. Exit code 1: a claim does not hold, or there was nothing to test."
)

HOW_TO = (
    "write one below `tests:`, as in\n"
    "  tests:\n"
    "    - name: what is claimed\n"
    "      attention: {pattern: heavy-hitter, prompt: 16, steps: 64, at: 20}\n"
    "      expect: [{keeps: 20}, {resident: {max: 32}}]"
)


@dataclass(frozen=True)
class Result:
    """How one test went, or why it (or its whole policy, where ``test`` is empty) could not be run.

    ``verdict`` is "passed", "failed" or "error"; ``message`` explains the last two, its first line in short.
    """

    spec: str
    policy: str
    test: str
    seconds: float = 0.0
    verdict: str = "passed"
    message: str = ""
    outcome: Outcome | None = None
    exit_code: int = 0


@dataclass(frozen=True)
class How:
    """What a test is run on."""

    runtime: bool
    compiled: bool


def run(
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SPEC…]", help="Policies: YAML files, names of shipped ones, or -; all shipped ones."),
    ] = None,
    words: Annotated[
        str, typer.Option("-k", metavar="WORDS", help="Only tests whose name or policy has the words: and, or, not.")
    ] = "",
    runtime: Annotated[bool, typer.Option("--runtime", help="On the torch runtime too, beside the oracle.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="The same with compiled steps (many seconds).")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", "-x", help="Stop at the first test that fails.")] = False,
    junitxml: Annotated[
        Path | None, typer.Option("--junitxml", metavar="FILE", help="Write the results as JUnit XML too.")
    ] = None,
    json: Json = False,
) -> None:
    """Run the tests that policies carry. A failure shows the first wrong step: what was kept, and why."""
    results = []
    for result in _results(specs or list(shipped_policies()), words, How(runtime or compiled, compiled), not json):
        results.append(result)
        if fail_fast and result.verdict != "passed":
            break
    if junitxml is not None:
        output.write_file(junitxml, junit(results))
    if json:
        output.json_object(_report(results))
    else:
        output.note(_summary(results))
    code = max((result.exit_code for result in results), default=1)
    if words and not any(result.test or result.exit_code for result in results):
        raise UsageError(f"-k {words!r} matches none of the tests; kvpolicy test without it names them")
    if code:
        raise typer.Exit(code)


def _results(specs: list[str], words: str, how: How, aloud: bool) -> Iterator[Result]:
    for spec in specs:
        try:
            policy = load_policy(spec)
        except PolicyError as error:
            output.error(error)
            yield Result(spec, spec, "", verdict="error", message=str(error), exit_code=error.exit_code)
            continue
        chosen = [n for n, test in enumerate(policy.tests) if matches(f"{policy.name}::{test.name}", words)]
        if not policy.tests:
            output.note(f"[yellow]{escape(policy.source)} has no tests:[/] {escape(HOW_TO)}")
        elif chosen and aloud:
            output.data(f"[bold]{escape(policy.name)}[/] ({escape(policy.source)})")
        for place, number in enumerate(chosen, 1):
            with output.busy(f"{policy.name}: test {place} of {len(chosen)}"):
                result = _run(spec, policy, number, how)
            if aloud:
                _show(result)
            yield result


def _run(spec: str, policy: Policy, number: int, how: How) -> Result:
    from kvpolicy.testing.agreement import Disagreement
    from kvpolicy.testing.runner import run_test

    name, begin = policy.tests[number].name, perf_counter()
    verdict, outcome, message, code = "passed", None, "", 0
    try:
        outcome = run_test(policy, number, runtime=how.runtime, compiled=how.compiled)
        if not outcome.passed:
            verdict, message, code = "failed", str(outcome), KvpolicyError.exit_code
    except Disagreement as error:
        verdict, message, code = "failed", str(error), KvpolicyError.exit_code
    except KvpolicyError as error:  # the test makes no sense, or the runtime cannot run the policy
        verdict, message, code = "error", str(error), error.exit_code
    return Result(spec, policy.name, name, perf_counter() - begin, verdict, message, outcome, code)


WORDS = {"passed": "[green]holds[/]", "failed": "[bold red]fails[/]", "error": "[bold red]error[/]"}


def _show(result: Result) -> None:
    remarks = []
    if result.outcome is not None and not result.outcome.evicted:
        remarks.append("nothing was evicted")
    if result.outcome is not None and result.outcome.near_ties:
        remarks.append(f"{plural(result.outcome.near_ties, 'choice')} that float32 cannot tell apart")
    remark = f" [yellow]({', '.join(remarks)})[/]" if remarks else ""
    output.data(f"  {WORDS[result.verdict]} {result.seconds:6.2f} s  {escape(result.test)}{remark}")
    if result.message:
        text = Text("\n".join(f"    {line}" for line in result.message.splitlines()))
        text.highlight_regex(r"(?m)^ *\| *\^+$", "red")
        text.highlight_regex(r"(?m)^ +\d+ \|", "dim")
        text.highlight_regex(r"(?m)^ +at position .*$", "bold")
        output.data(text)


def _summary(results: list[Result]) -> str:
    tests = [result for result in results if result.test]
    counts = [
        f"[{color}]{count} {word}[/]"
        for color, word, verdict in (("green", "hold", "passed"), ("red", "fail", "failed"), ("red", "error", "error"))
        if (count := sum(result.verdict == verdict for result in results))
    ]
    specs = len({result.spec for result in results})
    seconds = sum(result.seconds for result in results)
    said = ", ".join(counts) or "nothing was tested"
    return (
        f"{plural(len(tests), 'test')} of {specs} {'policy' if specs == 1 else 'policies'}: {said}, in {seconds:.1f} s"
    )


def _report(results: list[Result]) -> dict[str, Any]:
    """The `--json` object."""
    passed = bool(results) and all(result.verdict == "passed" for result in results)
    return {"passed": passed, "tests": [_test(result) for result in results]}


def _test(result: Result) -> dict[str, Any]:
    outcome = result.outcome
    failures = [
        {"claim": failure.claim, "file": place.file, "line": place.line, "column": place.column,
         "reason": place.reason, "details": list(failure.details)}
        for failure in (outcome.failures if outcome is not None else ())
        for place in [failure.place]
    ]  # fmt: skip
    return {
        "spec": result.spec,
        "policy": result.policy,
        "test": result.test or None,
        "verdict": result.verdict,
        "seconds": round(result.seconds, 4),
        "evicted": outcome.evicted if outcome is not None else None,
        "near_ties": outcome.near_ties if outcome is not None else None,
        "failures": failures,
        "message": result.message,
    }


def matches(name: str, words: str) -> bool:
    """Whether a name has the words of `-k`: texts joined by and, or, not (and binds before or), in any case."""
    if not words.strip():
        return True
    choices = [re.split(r"\band\b", choice) for choice in re.split(r"\bor\b", words.lower())]
    held = [[_holds(name.lower(), term.strip()) for term in terms] for terms in choices]
    return any(all(terms) for terms in held)


def _holds(name: str, term: str) -> bool:
    text = re.sub(r"^not\b\s*", "", term)
    if not text:
        raise UsageError("-k has nothing beside an `and`, `or` or `not`, as in -k 'milestone and not raas'")
    return (text in name) == (text == term)
