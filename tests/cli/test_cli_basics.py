"""The frame of the command line: verbs, streams, colour, exit codes, and how errors and bugs leave it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvpolicy
from kvpolicy import cli, errors
from kvpolicy.cli.main import VERBS, main

ROOT = Path(__file__).parents[2]

TWO_MISTAKES = """\
kvpolicy: 1
name: broken
pools:
  all:
    admit: everything
    bugdet: 64
"""


def command(*words: str, **settings: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options: dict[str, object] = {"capture_output": True, "text": True, "env": environment, **settings}
    return subprocess.run([sys.executable, "-m", "kvpolicy", *words], **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.yaml"
    path.write_text(TWO_MISTAKES)
    return path


# The frame


def test_every_file_with_a_run_is_a_verb() -> None:
    files = Path(cli.__file__).parent.glob("*.py")
    assert {path.stem for path in files if "\ndef run(" in path.read_text(encoding="utf-8")} == set(VERBS)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr()
    assert all(f" {verb} " in said.out for verb in VERBS)
    assert not said.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "-h"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Usage: kvpolicy {verb}" in said
    assert f"kvpolicy {verb}" in said.partition("Example")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-V"]) == 0
    assert capsys.readouterr().out == f"kvpolicy {kvpolicy.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [["--help"], *([verb, "--help"] for verb in VERBS), ["validate", "raas"], ["list"], ["schema"], ["env"]],
    ids=" ".join,
)
def test_no_torch_without_a_model(words: list[str]) -> None:
    code = (
        "import sys\nfrom kvpolicy.cli.main import main\n"
        f"code = main({words!r})\n"
        "loaded = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'{words} loaded {loaded}' if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# Usage


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lst"], "Did you mean 'list'?"),
        (["env", "--jsno"], "--jsno"),
        (["validate"], "SPEC"),
        (["list", "polices"], "polices"),
        (["validate", "raas", "--set", "budget"], "'budget' is not NAME=VALUE"),
        (["validate", "raas", "--set", "budget=1", "--set", "budget=2"], "budget twice"),
        (["schema", "-o", "/nowhere/at/all.json"], "cannot write /nowhere/at/all.json"),
    ],
)
def test_usage_errors_exit_with_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert not said.out


# Errors and bugs


def failing_env(monkeypatch: pytest.MonkeyPatch, fault: BaseException) -> None:
    def fail(devices: bool) -> None:
        raise fault

    monkeypatch.setattr("kvpolicy.cli.env.collect", fail)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.KvpolicyError, 1),
        (errors.UsageError, 2),
        (errors.CacheError, 2),
        (errors.PolicyError, 3),
        (errors.ModelError, 4),
        (errors.MissingExtra, 5),
    ],
)
def test_an_error_is_one_message(
    kind: type[errors.KvpolicyError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_env(monkeypatch, kind("pool [a] holds 5 tokens, at most 4; raise its budget"))
    assert main(["env", "--json"]) == code
    assert capsys.readouterr() == ("", "error: pool [a] holds 5 tokens, at most 4; raise its budget\n")


def test_a_bug_asks_for_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing_env(monkeypatch, ZeroDivisionError("[division] by zero"))
    assert main(["env"]) == 70
    said = capsys.readouterr()
    assert not said.out
    assert "bug in kvpolicy: ZeroDivisionError: [division] by zero (test_cli_basics.py, line " in said.err
    assert "kvpolicy env" in said.err
    assert "KVPOLICY_DEBUG=1" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize("fault", [ZeroDivisionError("zero"), errors.ModelError("no such model")], ids=["bug", "error"])
def test_debugging_shows_the_traceback(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_env(monkeypatch, fault)
    monkeypatch.setenv("KVPOLICY_DEBUG", "1")
    main(["env"])
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing_env(monkeypatch, KeyboardInterrupt())
    assert main(["env"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    script = f"PYTHONPATH={ROOT} {sys.executable} -m kvpolicy schema | head -c 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout == "{"
    assert not done.stderr


# Streams and colour


@pytest.mark.parametrize("words", [["--color", "always", "validate"], ["validate", "--color", "always"]])
def test_colour_on_demand(words: list[str], broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, str(broken)]) == 3
    assert "\x1b[" in capsys.readouterr().err


def test_no_colour_in_pipes(broken: Path) -> None:
    done = command("validate", str(broken))
    assert done.returncode == 3
    assert "\x1b[" not in done.stdout + done.stderr


@pytest.mark.parametrize("words", [[], ["--color", "never"]])
def test_no_colour_where_it_is_unwelcome(words: list[str], broken: Path) -> None:
    """On a terminal: NO_COLOR takes the colours away, `--color never` the bold face as well."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TERM": "xterm"}
    done = command("validate", str(broken), *words, capture_output=False, stderr=theirs, stdout=theirs, env=environment)
    os.close(theirs)
    said = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 3
    assert "broken.yaml" in said
    assert "\x1b[3" not in said and "\x1b[1;3" not in said
    assert not (words and "\x1b[" in said)


def test_the_environment_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    main(["--color", "always", "env"])
    assert os.environ["NO_COLOR"] == "1"
    assert "FORCE_COLOR" not in os.environ


@pytest.mark.parametrize("words", [["-q", "validate"], ["validate", "-q"]])
def test_quiet_leaves_out_remarks(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", "raas", "h2o"])
    assert "2 policies: 2 valid, 0 invalid" in capsys.readouterr().err
    main([*words, "raas", "h2o"])
    assert not capsys.readouterr().err


# The verbs


def test_validate_shows_every_mistake(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(broken), "raas"]) == 3
    said = capsys.readouterr()
    assert f"{broken}: invalid, 2 errors\nraas: valid, " in said.out
    assert f"{broken}:5:12: " in said.err
    assert f"{broken}:6:5: " in said.err
    assert "2 policies: 1 valid, 1 invalid" in said.err


def test_validate_as_json(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(broken), "raas", "--json"]) == 3
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["schema_version"], found["valid"]) == (1, False)
    bad, good = found["specs"]
    assert [(item["line"], item["column"]) for item in bad["errors"]] == [(5, 12), (6, 5)]
    assert (good["name"], good["valid"], good["errors"]) == ("raas", True, [])
    assert not said.err


def test_validate_reads_stdin() -> None:
    done = command("validate", "-", input="kvpolicy: 1\nname: piped\npools: {all: {admit: all}}\n")
    assert done.returncode == 0, done.stderr
    assert "piped" in done.stdout


def test_validate_sets_params(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "raas", "--set", "budget=2k"]) == 0
    assert main(["validate", "raas", "--set", "bugdet=2k"]) == 3
    assert "budget" in capsys.readouterr().err


def test_validate_of_nothing_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "./not-here.yaml"]) == 3
    assert "not-here.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "folder"), [("policies", "policies"), ("models", "patches")])
def test_list_finds_every_file(kind: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    suffix = {"policies": ".yaml", "patches": ".py"}[folder]
    files = {path.stem for path in (ROOT / folder).rglob(f"[!_]*{suffix}")}
    assert main(["list", kind, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)[kind]
    assert {entry["name"] for entry in entries} >= files
    assert all(entry["summary"] for entry in entries)


def test_list_knows_the_signals_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    from kvpolicy.scorers import SIGNALS

    assert main(["list", "signals", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["signals"]
    assert {entry["name"] for entry in entries} >= set(SIGNALS)
    assert all(entry["summary"] for entry in entries if entry["from"] == "kvpolicy")


def test_list_models_is_the_matrix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers as the configs say them, and versions as the record of `make matrix` has them."""
    from kvpolicy import versions

    runs = [("5.1.0", ("llama", "glm")), ("5.9.2", ("llama", "glm", "glm4")), ("5.10.0", ("llama",))]
    record = tuple(versions.Run(each, "2.13.0", "3.11", "", True, (), families) for each, families in runs)
    monkeypatch.setattr(versions, "runs", lambda: record)
    assert main(["list", "models"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split("  ")[0] == "family"
    rows = {line.split()[0]: [cell for cell in line.strip().split("  ") if cell] for line in lines if line.strip()}
    assert [cell.strip() for cell in rows["llama"][1:]] == ["llama", "full", "all", "transformers 5.1.0 to 5.10.0"]
    assert rows["glm"][1].strip() == "glm, glm4" and rows["glm"][-1].strip() == "transformers 5.9.2"
    assert rows["apertus"][-1].strip() == "not yet"
    assert main(["list", "models", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["models"]}
    assert entries["glm"]["tested"]["glm"] == {"transformers": ["5.1.0", "5.9.2"], "torch": ["2.13.0"]}
    assert entries["mixtral"]["layers"]["mixtral"]["window"]


def test_list_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in lines if line and line.split()[1:] == ["summary"]] == [
        "policies", "signals", "models", "builtins", "tasks",
    ]  # fmt: skip
    assert any(line.startswith("raas ") for line in lines)
    assert any(line.startswith("builtin:tiny ") for line in lines)


def test_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert {"kvpolicy", "name", "params", "pools"} <= set(printed["properties"])
    assert main(["schema", "-o", str(tmp_path / "schema.json")]) == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == printed
    assert not capsys.readouterr().out


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kvpolicy"] == kvpolicy.__version__
    assert {"torch", "transformers", "pydantic", "typer"} <= set(facts["packages"])
    assert "pytest" not in facts["packages"]
    assert main(["env", "--devices"]) == 0
    assert "\ncpu " in capsys.readouterr().out
