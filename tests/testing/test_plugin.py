"""The pytest plugin: what it collects and what it leaves alone, what a failure shows, and the fixture."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import pytest

import kvpolicy.testing.asserting  # noqa: F401 (before pytester, which forgets modules that a run has loaded)

ROOT = Path(__file__).parents[2]
INSTALLED = any(entry.value == "kvpolicy.testing.plugin" for entry in entry_points(group="pytest11"))

POLICY = """\
    kvpolicy: 1
    name: four
    params: {size: {default: 4, help: tokens}}
    pools:
      all: {admit: all, budget: count}
    tests:
      - name: the newest stay
        attention: {pattern: uniform, prompt: 6, steps: 10}
        expect: [{keeps: window, of: 4}]
      - name: the first token stays
        attention: {pattern: uniform, prompt: 6, steps: 10}
        expect: [{keeps: 0}]
    """.replace("size", "count")


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> object:
    """pytest in a folder of its own, with the plugin; `apart`: in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makefile(".yaml", four=dedent(POLICY))

    def run(*arguments: str, apart: bool = False) -> pytest.RunResult:
        named = [] if INSTALLED else ["-p", "kvpolicy.testing.plugin"]
        runner = pytester.runpytest_subprocess if apart else pytester.runpytest_inprocess
        return runner("-p", "no:cacheprovider", *named, *arguments)

    return run


def test_a_policy_on_the_command_line_is_a_file_of_tests(run) -> None:  # type: ignore[no-untyped-def]
    result = run("four.yaml", "-v")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["four.yaml::the newest stay PASSED*", "four.yaml::the first token stays FAILED*"])


def test_a_failure_is_the_runners_explanation_and_no_traceback(run) -> None:  # type: ignore[no-untyped-def]
    result = run("four.yaml")
    result.stdout.fnmatch_lines(
        [
            "*_ four: the first token stays _*",
            "*four.yaml:12:14: the first token stays: 0 left",
            "*expect: [[]{keeps: 0}[]]",
            "*at position 5 (t 0, prompt), layer 0, row 0, KV head 0",
            "*pool all keeps 4 tokens: 2..5",
            "*budget 4; protected: none",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*runner.py*")


def test_one_test_can_be_named(run) -> None:  # type: ignore[no-untyped-def]
    run("four.yaml::the newest stay").assert_outcomes(passed=1)
    run("four.yaml", "-k", "newest").assert_outcomes(passed=1, deselected=1)


def test_nothing_in_a_folder_is_touched_unless_the_project_says_so(run, pytester: pytest.Pytester) -> None:  # type: ignore[no-untyped-def]
    pytester.makefile(".yaml", other="kvpolicy: [not, one")
    pytester.makepyfile("def test_it(): pass")
    run().assert_outcomes(passed=1)
    run(".").assert_outcomes(passed=1)
    pytester.makeini("[pytest]\nkvpolicy_files = f*.yaml\n")
    run().assert_outcomes(passed=2, failed=1)
    run("four.yaml").assert_outcomes(passed=1, failed=1)


def test_patterns_reach_into_folders(run, pytester: pytest.Pytester) -> None:  # type: ignore[no-untyped-def]
    folder = pytester.mkdir("policies")
    (pytester.path / "four.yaml").rename(folder / "four.yaml")
    pytester.makeini("[pytest]\nkvpolicy_files = policies/**/*.yaml\n")
    run().assert_outcomes(passed=1, failed=1)
    run("policies").assert_outcomes(passed=1, failed=1)


def test_a_yaml_file_that_is_no_policy_is_left_alone(run, pytester: pytest.Pytester) -> None:  # type: ignore[no-untyped-def]
    pytester.makefile(".yaml", other="pools: {kvpolicy: 1}\n")
    result = run("other.yaml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR or result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    result.stdout.no_fnmatch_line("*other.yaml:1:*")


def test_a_malformed_policy_is_one_collection_error_with_its_place(run, pytester: pytest.Pytester) -> None:  # type: ignore[no-untyped-def]
    pytester.makefile(".yaml", bad="kvpolicy: 1\nname: bad\npools: {all: {admit: everything}}\n")
    result = run("bad.yaml")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*bad.yaml:3:22: *everything*"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*plugin.py*")


def test_a_test_that_makes_no_sense_fails_with_its_place(run, pytester: pytest.Pytester) -> None:  # type: ignore[no-untyped-def]
    pytester.makefile(".yaml", odd=dedent(POLICY).replace("{keeps: 0}", "{keps: 0}"))
    result = run("odd.yaml")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*odd.yaml:12:15: *", "*did you mean `keeps`?"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_workers_of_xdist_collect_the_same(run) -> None:  # type: ignore[no-untyped-def]
    run("four.yaml", "-n", "2", apart=True).assert_outcomes(passed=1, failed=1)


@pytest.mark.skipif(not INSTALLED, reason="kvpolicy is not installed, so pytest does not know the plugin's name")
def test_it_can_be_switched_off(run) -> None:  # type: ignore[no-untyped-def]
    result = run("-p", "no:kvpolicy", "four.yaml", apart=True)
    result.stdout.no_fnmatch_line("*the newest stay*")
    assert result.ret != 0
    run("--fixtures").stdout.fnmatch_lines(["run_policy*"])


def test_the_runtime_runs_when_it_is_asked_for(run, pytester: pytest.Pytester) -> None:  # type: ignore[no-untyped-def]
    pytester.makeconftest(
        """
        import sys

        def pytest_sessionfinish():
            print("with torch" if "torch" in sys.modules else "without torch")
        """
    )
    run("four.yaml", "-s", "-k", "newest", apart=True).stdout.fnmatch_lines(["*without torch*"])
    result = run("four.yaml", "-s", "-k", "newest", "--kvpolicy-runtime", apart=True)
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(["*with torch*"])


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, pytest\nbefore = set(sys.modules)\nimport kvpolicy.testing.plugin\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'torch', 'transformers', 'numpy', 'pydantic', 'yaml'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_fixture_asserts_in_one_line(run, pytester: pytest.Pytester) -> None:  # type: ignore[no-untyped-def]
    pytester.makepyfile(
        """
        MILESTONE = {"pattern": "milestone", "prompt": 8, "steps": 40, "at": 15, "until": 35, "noise": 0}

        def test_holds(run_policy):
            run = run_policy("raas", MILESTONE, budget=24, page_size=2)
            run.keeps("prompt").keeps(15, until=35).evicts(range(12, 14), by=28)
            assert run.resident(max=24).peak(25).evicted > 0

        def test_holds_on_the_runtime(run_policy):
            assert run_policy("raas", MILESTONE, budget=24, page_size=2, runtime=True).order([22, 15, 24])

        def test_does_not_hold(run_policy):
            run_policy("raas", MILESTONE, budget=24, page_size=2).keeps(15, until=45)
        """
    )
    result = run(apart=True)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            ">*keeps(15, until=45)",
            "E*AssertionError: raas: keeps(15, until=45): 15 left",
            "E*at position *layer 0, row 0, KV head 0",
        ]
    )
    result.stdout.no_fnmatch_line("*asserting.py*")
