"""`kvpolicy test`: what holds and what does not, told in lines, JSON and JUnit XML, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from xml.etree import ElementTree

import pytest

from kvpolicy.cli.main import main
from kvpolicy.cli.test import matches
from kvpolicy.errors import UsageError
from kvpolicy.language import load_policy, shipped_policies
from kvpolicy.plan import make_plan

ROOT = Path(__file__).parents[2]

POLICY = """\
    kvpolicy: 1
    name: four
    pools:
      all: {admit: all, budget: 4}
    tests:
      - name: the newest stay
        attention: {pattern: uniform, prompt: 6, steps: 10}
        expect: [{keeps: window, of: 4}]
      - name: "the <first> stays & \\e is told"
        attention: {pattern: uniform, prompt: 6, steps: 10}
        expect: [{keeps: 2}, {resident: {max: 4}}]
    """


@pytest.fixture
def four(tmp_path: Path) -> Path:
    path = tmp_path / "four.yaml"
    path.write_text(dedent(POLICY))
    return path


def write(folder: Path, text: str) -> str:
    path = folder / "policy.yaml"
    path.write_text(dedent(text))
    return str(path)


def test_each_test_is_a_line_and_a_failure_says_what_went_and_why(
    four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", str(four)]) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == f"four ({four})"
    assert lines[1].split()[0] == "holds" and lines[1].endswith(" s  the newest stay")
    assert lines[2].split()[0] == "fails"
    assert f"{four}:11:14: " in said.out and "2 left" in said.out
    assert "at position 6 (t 1, generated token), layer 0, row 0, KV head 0" in said.out
    assert "budget 4; protected: none" in said.out
    assert "2: 2 <, 3: 3" in said.out  # the scores, what left marked
    assert "2 tests of 1 policy: 1 hold, 1 fail" in said.err


def test_a_policy_that_holds_exits_with_0_and_without_torch() -> None:
    code = (
        "import sys\nfrom kvpolicy.cli.main import main\n"
        "code = main(['test', 'raas', 'h2o'])\n"
        "loaded = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    tests = len(load_policy("raas").tests) + len(load_policy("h2o").tests)
    assert f"{tests} tests of 2 policies: {tests} hold" in done.stderr


def test_without_a_policy_all_that_ship_are_tested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "-k", "nothing leaves"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "} <= {*shipped_policies()}


def test_json_holds_every_test_and_the_place_of_every_failure(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", str(four), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    holds, fails = report["tests"]
    assert (holds["verdict"], holds["failures"], holds["message"]) == ("passed", [], "")
    assert holds["evicted"] == 2 * 2 * (16 - 4)  # layers, KV heads, tokens
    (failure,) = fails["failures"]
    assert (failure["claim"], failure["line"]) == (0, 11)
    assert fails["verdict"] == "failed" and "2 left" in failure["reason"]


def test_junit_xml_is_read_back(four: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.xml"
    broken = write(tmp_path, "kvpolicy: 1\nname: broken\npools: {all: {admit: everything}}\n")
    assert main(["test", str(four), broken, "--junitxml", str(file), "-q"]) == 3
    suite = ElementTree.parse(file).getroot()[0]
    assert {key: suite.get(key) for key in ("tests", "failures", "errors")} == {
        "tests": "3", "failures": "1", "errors": "1",
    }  # fmt: skip
    holds, fails, error = suite
    assert holds.get("name") == "the newest stay" and not len(holds)
    assert fails.get("name") == "the <first> stays & #x1B is told"  # XML cannot hold an escape character
    assert "2 left" in str(fails[0].get("message")) and "at position 6" in str(fails[0].text)
    assert error[0].tag == "error" and "everything" in str(error[0].text)


def test_fail_fast_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = "- {name: gone, attention: {pattern: uniform, prompt: 6}, expect: [{keeps: 0}]}\n"
    path = write(tmp_path, f"kvpolicy: 1\nname: four\npools: {{all: {{admit: all, budget: 4}}}}\ntests:\n{test * 3}")
    assert main(["test", path, "--fail-fast", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["tests"]) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", True),
        ("milestone", True),
        ("RaaS", True),
        ("phoenix", False),
        ("not phoenix", True),
        ("milestone and not raas", False),
        ("phoenix or a milestone stays", True),
        ("phoenix or milestone and h2o", False),
    ],
)
def test_words_choose_tests(words: str, expected: bool) -> None:
    assert matches("raas::a milestone stays", words) is expected


@pytest.mark.parametrize("words", ["milestone and", "not", "or raas"])
def test_half_an_expression_is_refused(words: str) -> None:
    with pytest.raises(UsageError, match="nothing beside"):
        matches("phoenix", words)


def test_words_that_match_nothing_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "raas", "-k", "no such words"]) == 2
    assert "matches none" in capsys.readouterr().err


def test_a_policy_without_tests_says_how_to_write_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "kvpolicy: 1\nname: plain\npools: {all: {admit: all, budget: 24}}\n")
    assert main(["test", path]) == 1
    said = capsys.readouterr().err
    assert f"{path} has no tests" in said and "nothing was tested" in said
    example = dedent(said.partition("as in\n")[2].partition("\n0 tests")[0])
    Path(path).write_text(Path(path).read_text() + example)
    main(["test", path])  # what it told us to write is a test
    assert "1 test of 1 policy" in capsys.readouterr().err


def test_a_test_that_makes_no_sense_is_an_error_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = "tests:\n- {name: odd, attention: {pattern: uniform, prompt: 6}, expect: [{keps: 0}]}\n"
    path = write(tmp_path, f"kvpolicy: 1\nname: four\npools: {{all: {{admit: all, budget: 4}}}}\n{test}")
    assert main(["test", path]) == 3
    said = capsys.readouterr().out
    assert f"{path}:5:" in said and "did you mean `keeps`?" in said and " error " in said


def test_the_runtime_runs_beside_the_oracle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvpolicy.testing.beside import Beside

    fed = []
    feed = Beside.feed
    monkeypatch.setattr(Beside, "feed", lambda self, *args, **more: fed.append(self) or feed(self, *args, **more))
    assert main(["test", "window", "--runtime"]) == 0
    assert fed and len(set(map(id, fed))) == len(load_policy("window").tests)


def test_what_the_runtime_keeps_otherwise_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvpolicy.scorers import SIGNALS

    recency = SIGNALS["recency"]
    monkeypatch.setitem(SIGNALS, "recency", lambda *given: -recency(*given))
    assert main(["test", "window", "--runtime"]) == 1
    assert "kept by the runtime alone" in capsys.readouterr().out


def test_what_the_runtime_cannot_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = dedent(POLICY).replace("budget: 4}", "budget: 4, evict: {scope: across-heads}}")
    path = write(tmp_path, text)
    assert main(["test", path, "-k", "newest"]) == 0
    assert main(["test", path, "-k", "newest", "--runtime"]) == 2
    assert "cannot do yet" in capsys.readouterr().out


def test_compiled_steps_are_one_graph_for_each_shape_and_kind() -> None:
    from kvpolicy.testing.compiled import CompiledRun
    from kvpolicy.testing.feeding import RuntimeBeside, watch
    from kvpolicy.testing.patterns import synthesize

    said = synthesize({"pattern": "uniform", "prompt": 6, "steps": 10, "layers": 2})
    plan = make_plan(load_policy("window", set={"window": 4}), said.geometry, prompt=6, max_new_tokens=10)
    feed = RuntimeBeside(plan, compiled=True)
    assert sum(len(seen.step.heads[seen.head]["all"].evicted) for seen in watch(feed, said)) > 0
    assert isinstance(feed.beside.generated, CompiledRun)
    assert feed.beside.generated.graphs == 1
