"""The search for counter-examples, bounded: 300 cases of one seed agree, and what the search says of itself holds."""

from __future__ import annotations

import random

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from kvpolicy.errors import UsageError
from kvpolicy.lab.fuzz.__main__ import main
from kvpolicy.lab.fuzz.bytes import Batch, Hang, Read, limited, read_batch, read_one
from kvpolicy.lab.fuzz.cases import Chunk, Found, search, shrunk
from kvpolicy.lab.fuzz.coverage import every_feature, features
from kvpolicy.language import loads_policy
from kvpolicy.plan import unsupported
from kvpolicy.testing.feeding import plan_for
from kvpolicy.testing.patterns import synthesize
from kvpolicy.testing.runner import run_tests
from kvpolicy.testing.search import agree, reproduction
from kvpolicy.testing.shrinking import Choices, shrink
from kvpolicy.testing.strategies import policies, texts
from kvpolicy.testing.strategies.policies import draw_policy
from kvpolicy.testing.strategies.texts import draw_text

PARTS = 4


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_runtime_and_oracle_agree_on_random_cases(part: int) -> None:
    found = search(Chunk(first=part * 80, count=80, seed=0))
    assert not found.failures, found.failures[0]
    assert found.agreed + sum(found.refused.values()) >= 80 and found.agreed >= 75
    assert len(found.distinct) == 80
    assert found.evicting > 40
    assert found.near_ties < found.compared // 50, found.ties


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_compiled_cases_agree(count: int) -> None:
    found = Found()
    number = 0
    while found.compiled < count and number < 20:
        case = search(Chunk(first=number, count=1, seed=0, compile_every=1)) if evicts(number) else Found()
        assert not case.failures, case.failures[0]
        found.add(case)
        number += 1
    assert found.compiled == count


def evicts(number: int) -> bool:
    return search(Chunk(first=number, count=1, seed=0)).evicting > 0


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(policies(), texts())
def test_policies_from_the_whole_language_are_valid_and_the_oracle_runs_them(policy: str, text: dict) -> None:
    loaded = loads_policy(policy)
    assert loads_policy(loaded.to_yaml()) == loaded
    assert features(policy, text) <= every_feature() | {"text: 3 rows"}
    agree(policy, text)


def test_supported_policies_are_those_that_the_plan_supports() -> None:
    refused = 0
    for number in range(60):
        choices = Choices(random=random.Random(number))
        policy, text = draw_policy(choices, supported=True), draw_text(choices)
        try:
            refused += policy is not None and any(unsupported(plan_for(loads_policy(policy), synthesize(text))))
        except UsageError:
            continue
    assert not refused


def test_a_case_is_its_seed() -> None:
    def drawn(seed: int) -> tuple[str | None, dict]:
        choices = Choices(random=random.Random(seed))
        return draw_policy(choices), draw_text(choices)

    assert drawn(3) == drawn(3) != drawn(4)


def test_a_failure_shrinks_to_a_file_that_shows_it(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """As if the runtime could not drop anything by attention: what is left is a policy of little more than that."""

    def broken(policy: str, text: dict) -> None:
        if "attention" in policy and "every: " in policy:
            raise AssertionError("it broke")

    monkeypatch.setattr("kvpolicy.lab.fuzz.cases.agree", broken)
    chunk = Chunk(first=0, count=60, seed=1)
    choices = next(
        taken
        for number in range(60)
        if (taken := taken_by(chunk, number))
        and (policy := draw_policy(Choices(taken), supported=True))
        and "attention" in policy
        and "every: " in policy
    )
    text = shrunk(chunk, 0, choices)
    assert "it broke" in text and "--seed 1 --case 0" in text
    document = yaml.safe_load(text)
    assert len(document["pools"]) == 1 and len(text.splitlines()) < 45
    monkeypatch.undo()
    assert all(outcome.passed for outcome in run_tests(loads_policy(text), runtime=True))


def taken_by(chunk: Chunk, number: int) -> list[int]:
    choices = Choices(random=random.Random(f"{chunk.seed}/{number}/{chunk.supported}"))
    if draw_policy(choices, supported=True) is None:
        return []
    draw_text(choices)
    return choices.taken


def test_shrinking_finds_the_least() -> None:
    def fails(choices: Choices) -> bool:
        numbers = [choices(0, 99) for _ in range(choices(0, 9))]
        return sum(numbers) >= 120

    best = shrink([9, *[77] * 9], fails)
    assert best[0] == 2 and sum(best[1:]) == 120


def test_reproduction_is_a_policy_with_a_test() -> None:
    text = reproduction("kvpolicy: 1\nname: one\npools: {all: {admit: all}}\n", {"pattern": "sink"}, "because")
    assert text.startswith("# because\n")
    assert loads_policy(text).tests[0].attention == {"pattern": "sink"}


def test_what_was_never_drawn_is_named_and_fails_a_long_run(capsys: pytest.CaptureFixture[str]) -> None:
    from collections import Counter

    from kvpolicy.lab.fuzz.__main__ import JUDGED, judged

    drawn = Counter(every_feature() - {"Memory.decay"})
    assert "Memory.decay" in judged(drawn, JUDGED)[0]
    assert judged(drawn, JUDGED - 1) == []
    assert "never drawn: Memory.decay" in capsys.readouterr().out


def test_mutated_texts_are_read() -> None:
    read = read_batch(Batch(first=0, count=150, seed=0))
    assert (read.texts, read.failures) == (150, [])
    assert read.loaded and read.refused and read.diagnostics >= read.refused


def test_an_exception_and_a_hang_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ZeroDivisionError("oops"), Hang("more than 10 seconds"), MemoryError()):

        def broken(*arguments: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("kvpolicy.lab.fuzz.bytes.loads_policy", broken)
        read = Read()
        with limited():
            read_one(b"kvpolicy: 1\n", 7, Batch(7, 1, 3), read)
        assert len(read.failures) == 1
        assert type(error).__name__ in read.failures[0] and "text 7" in read.failures[0]


def test_a_text_that_hangs_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr("kvpolicy.lab.fuzz.bytes.loads_policy", forever)
    monkeypatch.setattr("kvpolicy.lab.fuzz.bytes.LIMIT", 0.2)
    read = Read()
    with limited():
        read_one(b"", 0, Batch(0, 1, 0), read)
    assert "Hang" in read.failures[0]


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    code = main(
        ["--cases", "3", "--texts", "20", "--workers", "1", "--compile-every", "0", "--failures", str(tmp_path)]
    )
    told = capsys.readouterr().out
    assert code == 0 and "no counter-examples" in told
    assert "3 cases agreed" in told or "cases agreed" in told
    assert "20 mutated texts, seed 0" in told
