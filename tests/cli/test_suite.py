"""`kvpolicy compare --suite`: what it prints and writes, and how wrong input is refused."""

import json
from pathlib import Path

import pytest

from kvpolicy.cli.main import main

SHORT = ["--items", "2", "--size", "40", "--max-new-tokens", "16", "--budgets", "20,32"]


def test_a_suite_is_shown_and_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "raas"
    words = ["compare", "--suite", "raas", *SHORT, "--only", "raas-late", "-o", str(folder)]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "Accuracy against budget" in out and "late answers: RaaS is better than H2O: " in out
    assert "builtin:tiny, float32 on cpu, task phrase: 2 items of 40 words" in out
    assert "phrase: h2o at 20 (" in err and "index.html" in err
    assert {"about.json", "index.html", "raas-accuracy.jsonl"} <= {path.name for path in folder.iterdir()}
    rows = (folder / "raas-accuracy.jsonl").read_text()
    assert main([*words, "--json", "-q", "--html", str(tmp_path / "page.html")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told["experiments"]] == ["raas-accuracy", "raas-late"]
    assert told["about"]["model"] == "builtin:tiny" and told["experiments"][0]["findings"][0]["word"]
    assert (folder / "raas-accuracy.jsonl").read_text() == rows and (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--suite", "ras"], 2, "did you mean `raas`?"),
        (["--suite", "raas", "h2o", "builtin:tiny"], 2, "--suite brings its own policies"),
        (["--suite", "raas", "h2o"], 2, "give a model alone, not h2o"),
        (["--suite", "raas", "--only", "raas-lat"], 2, "did you mean `raas-late`?"),
        (["--suite", "raas", "--save", "rows.jsonl"], 2, "drop --save"),
        (["--suite", "raas", "--set", "budget=3"], 2, "drop --set"),
        (["--suite", "raas", "--tasks", "passkey"], 2, "no tokens for the words of the task passkey"),
        (["--suite", "raas", "--tasks", "pasky"], 2, "did you mean `passkey`?"),
        (["--suite", "raas", "--html", "none/page.html"], 2, "no folder"),
        (["h2o", "--output", "folder"], 2, "--output is for --suite"),
        (["h2o", "--tasks", "nosuch"], 2, "fidelity"),
        ([], 2, "no policy was given"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *words]) == code
    out, err = capsys.readouterr()
    assert said in err.replace("\n", " ") and "Traceback" not in err and out == ""


def test_a_file_in_the_place_of_the_folder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert main(["compare", "--suite", "raas", *SHORT, "-o", str(tmp_path / "x")]) == 2
    assert "is no folder" in capsys.readouterr().err
