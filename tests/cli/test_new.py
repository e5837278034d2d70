"""`kvpolicy new`: what it writes is valid and passes its own tests, and nothing that exists is overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from kvpolicy.cli.main import main
from kvpolicy.language import load_policy, shipped_policies
from kvpolicy.language.schema import json_schema

ROOT = Path(__file__).parents[2]
INSTALLED = any(entry.value == "kvpolicy.testing.plugin" for entry in entry_points(group="pytest11"))


@pytest.mark.parametrize("start", ["blank", *shipped_policies()])
def test_a_new_policy_is_valid_and_its_tests_pass(start: str, tmp_path: Path) -> None:
    assert main(["new", "mine", "--from", start, "-o", str(tmp_path)]) == 0
    policy = load_policy(tmp_path / "mine.yaml")
    assert policy.name == "mine" and policy.tests
    assert start == "blank" or policy.digest == load_policy(start).digest
    assert main(["test", str(tmp_path / "mine.yaml")]) == 0


def test_a_policy_from_blank_evicts_and_breaks_where_a_claim_is_wrong(tmp_path: Path) -> None:
    assert main(["new", "mine", "-o", str(tmp_path)]) == 0
    path = tmp_path / "mine.yaml"
    text = path.read_text()
    assert sum(line.lstrip().startswith("#") or "  # " in line for line in text.splitlines()) > 10  # it is commented
    path.write_text(text.replace("{keeps: 12}", "{keeps: 13}"))
    assert main(["test", str(path)]) == 1


def test_the_first_line_names_a_schema_that_lies_beside(tmp_path: Path) -> None:
    assert main(["new", "mine", "-o", str(tmp_path / "new folder")]) == 0
    modeline = (tmp_path / "new folder" / "mine.yaml").read_text().splitlines()[0]
    assert modeline.startswith("# yaml-language-server: $schema=")
    schema = tmp_path / "new folder" / modeline.partition("$schema=")[2]
    assert json.loads(schema.read_text()) == json_schema()


def test_json_names_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "mine", "--from", "raas", "-o", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == [str(tmp_path / "mine.yaml"), str(tmp_path / "kvpolicy.schema.json")]


@pytest.mark.parametrize("words", [["mine"], ["mine", "--scorer"]])
def test_nothing_is_overwritten(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    there = tmp_path / ("mine/pyproject.toml" if "--scorer" in words else "mine.yaml")
    there.write_text("my own")
    assert main(["new", *words, "-o", str(tmp_path)]) == 2
    assert f"{there} exists, and nothing is overwritten" in capsys.readouterr().err
    assert there.read_text() == "my own"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [there]


def test_a_schema_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "kvpolicy.schema.json").write_text("my own")
    assert main(["new", "mine", "-o", str(tmp_path)]) == 0
    assert (tmp_path / "kvpolicy.schema.json").read_text() == "my own"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["my policy"], 3, "`my policy` is no name"),
        (["mine.yaml"], 2, "give the policy's, mine"),
        (["raas"], 2, "raas is the name of a shipped policy"),
        (["mine", "--from", "ras"], 2, "did you mean `raas`?"),
        (["mine", "-o", "file/below"], 2, "cannot make the folder"),
        (["mine", "--scorer", "--from", "raas"], 2, "leave out --from"),
        (["key_power", "--scorer"], 2, "as in key-power"),
        (["key-norm", "--scorer"], 2, "there is a signal key-norm already"),
    ],
)
def test_mistakes(
    words: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["new", *words]) == code
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_new_signals_package_passes_its_own_tests_once_it_is_installed(tmp_path: Path) -> None:
    assert main(["new", "key-power", "--scorer", "-o", str(tmp_path)]) == 0
    package, site = tmp_path / "key-power", tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target"]
    subprocess.run([sys.executable, *install, str(site), str(package)], check=True, cwd=tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    plugin = [] if INSTALLED else ["-p", "kvpolicy.testing.plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *plugin],
        cwd=package, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "key-power.yaml::the newest stay, and nothing beyond the budget" in done.stdout
    assert "test_the_runtime_keeps_what_the_oracle_keeps[summed over time, pages]" in done.stdout
    listed = subprocess.run(
        [sys.executable, "-m", "kvpolicy", "list", "signals", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = {entry["name"]: entry for entry in json.loads(listed.stdout)["signals"]}
    assert found["key-power"]["from"] == "the package key-power 0.1.0"
