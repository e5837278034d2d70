"""`kvpolicy compare`: what it prints, writes and takes up again, and how wrong input is refused."""

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvpolicy.cli.compare import is_model, split
from kvpolicy.cli.main import main
from kvpolicy.errors import UsageError

QUICK = ["compare", "h2o", "--budgets", "20,400", "--items", "2", "--size", "40", "--max-new-tokens", "6"]


class Balanced(HTMLParser):
    """Every element is closed by its own end."""

    void = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_one_run_is_shown_written_and_taken_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows, table, page, drawn = (tmp_path / name for name in ("r.jsonl", "r.csv", "r.html", "r.png"))
    words = [*QUICK, "--save", str(rows), "--csv", str(table)]
    assert main(words) == 0
    out, err = capsys.readouterr()
    for word in ("phrase: 2 items, 96 answers", "dense", "h2o", "window", "random", "against full", "Not run:"):
        assert word in out
    assert "h2o at 400: a budget of 400 tokens holds all" in out and "2 items are too few" in out
    assert "phrase: h2o at 20 (1 of 4)" in err
    lines = rows.read_text().splitlines()
    assert len(lines) == 8 and json.loads(lines[0])["kvpolicy_row"] == 1
    facts = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [fact["policy"] for fact in facts][:2] == ["dense", "h2o"] and len(facts) == 4
    assert float(facts[1]["evicted"]) > 0 and facts[1]["digest"] and facts[1]["settings"] == "heavy=10 recent=10"

    assert main([*words, "--html", str(page), "--png", str(drawn), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "8 of 8 results were in" in err and rows.read_text().splitlines() == lines
    told = json.loads(out)
    assert told["schema_version"] == 1 and told["entries"][0]["label"] == "dense" and told["verdicts"]
    assert {"kvpolicy", "torch", "transformers"} <= set(told["versions"]) and told["seeds"] == [0]
    assert [each["budget"] for each in told["refused"]] == [400] * 3
    assert drawn.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    reader = Balanced()
    reader.feed(text)
    assert not reader.open and "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert "Before you believe it" in text and "h2o at 20: " in text and "Not run" in text


def test_params_instead_of_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "window", "--budgets", "own", "--set", "window=20", *QUICK[4:], "--json", "-q"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(entry["label"], entry["budget"], entry["held"]) for entry in told["entries"]] == [
        ("dense", None, 47),
        ("window", None, 20),
    ]


@pytest.mark.parametrize(
    ("words", "specs", "model"),
    [
        (["h2o"], ["h2o"], "builtin:tiny"),
        (["h2o", "raas", "builtin:smollm2"], ["h2o", "raas"], "builtin:smollm2"),
        (["h2o", "my/policy.yaml"], ["h2o", "my/policy.yaml"], "builtin:tiny"),
        (["h2o", "HuggingFaceTB/SmolLM2-135M"], ["h2o"], "HuggingFaceTB/SmolLM2-135M"),
        (["-", "model.gguf"], ["-"], "model.gguf"),
        (["h2o", "no-such-policy"], ["h2o", "no-such-policy"], "builtin:tiny"),
    ],
)
def test_the_last_word_may_be_a_model(words: list[str], specs: list[str], model: str) -> None:
    assert split(words) == (specs, model)


def test_a_folder_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "h2o").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_model("weights") and not is_model("h2o") and not is_model("-")
    with pytest.raises(UsageError, match="no policy was given"):
        split(["weights"])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["h2o", "--tasks", "paskey"], 2, "did you mean `passkey`?"),
        (["h2o", "--budgets", "many"], 2, "--budgets"),
        (["h2o", "--items", "0"], 2, "--items"),
        (["builtin:tiny"], 2, "no policy was given"),
        (["builtin:tiny", "h2o"], 2, "builtin:tiny is a model: give one, after all policies"),
        (["nothing-like-it"], 3, "nothing-like-it"),
        (["h2o", "tova", "--set", "beta=3"], 2, "none of h2o, tova"),
        (["h2o", "builtin:tiney"], 4, "builtin:tiny"),
        (["h2o", "--save", "none/r.jsonl"], 2, "no folder"),
        (["h2o", "--html", "none/r.html"], 2, "no folder"),
        (["h2o", "--tasks", "passkey"], 2, "no tokens for the words of the task passkey"),
        (["h2o", "--size", "5"], 2, "at least 15 words"),
        (["h2o", "--size", "900"], 2, "254 words at the most"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *words]) == code
    out, err = capsys.readouterr()
    assert said in err.replace("\n", " ") and "Traceback" not in err and out == ""


def test_a_file_of_something_else_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("my notes\n")
    assert main([*QUICK, "--save", str(path)]) == 2
    assert "line 1: it is no row of compare" in capsys.readouterr().err and path.read_text() == "my notes\n"


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("kvpolicy.lab.chart.find_spec", lambda name: None)
    assert main([*QUICK, "--png", "r.png"]) == 5
    assert "kvpolicy[plot]" in capsys.readouterr().err


def test_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "tasks", "--json"]) == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)["tasks"]}
    assert {"passkey", "needles", "variables", "copy", "questions", "phrase"} <= set(listed)
    assert listed["phrase"]["words"] == 78
