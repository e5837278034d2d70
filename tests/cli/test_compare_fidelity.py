"""`kvpolicy compare --tasks fidelity`: the table on given texts, what is written, and what is refused."""

import csv
import json
from pathlib import Path

import pytest

from kvpolicy.cli.main import main
from kvpolicy.models.tiny.task import make_problem


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    problems = [make_problem(seed, words=8, hums=24) for seed in range(2)]
    lines = [{"prompt": each.prompt, "output": " " + " ".join(each.answer(40))} for each in problems]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked(dataset: Path, *more: str) -> list[str]:
    given = ["compare", "h2o", "builtin:tiny", "--tasks", "fidelity", "--budgets", "16", "-n", "12"]
    return [*given, "--dataset", str(dataset), *more]


def test_the_table_the_rows_and_the_pictures(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, table, plot, page = (tmp_path / name for name in ("rows.jsonl", "table.csv", "plot.png", "page.html"))
    files = ["--save", str(rows), "--csv", str(table), "--png", str(plot), "--html", str(page)]
    assert main(asked(dataset, *files)) == 0
    shown = capsys.readouterr()
    assert "KL, nats" in shown.out and "random-unpinned" in shown.out
    assert "2 texts: intervals say how these vary" in shown.out
    assert len(rows.read_text().splitlines()) == 2 * 4
    lines = list(csv.DictReader(table.open()))
    assert {line["policy"] for line in lines} == {"dense", "h2o", "window", "random-unpinned"}
    assert all(float(line["low"]) <= float(line["value"]) <= float(line["high"]) for line in lines)
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = page.read_text()
    for title in ("By budget", "Along the output, at 16 tokens", "All numbers", "Mass kept:", "h2o at 16: "):
        assert title in written
    assert "2 texts: intervals say how these vary" in written and "<script" not in written
    assert main(asked(dataset, "--save", str(rows), "--json")) == 0
    told = capsys.readouterr()
    assert "8 of 8 results were in" in told.err
    report = json.loads(told.out)
    assert {entry["label"] for entry in report["entries"]} >= {"dense", "h2o"}
    assert report["way"] == "layer by layer"
    by_name = {entry["label"]: entry for entry in report["entries"]}
    assert by_name["dense"]["mass"]["value"] == 1 > by_name["h2o"]["mass"]["value"] > 0.1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tasks", "fidelity"], "needs texts: --dataset FILE"),
        (["--tasks", "fidelity,phrase", "--dataset", "x.jsonl"], "run the other tasks apart"),
        (["--tasks", "phrase", "--dataset", "x.jsonl"], "--dataset is for the task fidelity"),
        (["--split", "0.5"], "--split is for the task fidelity"),
        (["--tasks", "fidelity", "--dataset", "none.jsonl"], "cannot read none.jsonl"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "h2o", "builtin:tiny", *arguments]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
