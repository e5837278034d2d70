"""`kvpolicy analyze`: tables, JSON, files, a policy that runs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvpolicy import load_policy
from kvpolicy.cli.main import main
from kvpolicy.models.tiny.task import make_problem

SMALL = ["--window", "8", "--silence", "24", "-n", "100"]


def test_it_shows_classes_layers_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", *SMALL]) == 0
    said, _ = capsys.readouterr()
    lines = {line.split()[0]: line.split() for line in said.splitlines() if line.strip()}
    assert {"sink", "local", "heavy-hitter", "milestone", "phoenix", "lazy", "all"} <= set(lines)
    assert lines["read"][1:3] == ["78", "prompt"]
    assert {"0", "1", "heads", "milestones", "phoenixes"} <= set(lines)
    assert "stability" not in lines  # of a single text


def test_a_dataset_is_read_as_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = [make_problem(seed) for seed in range(3)]
    data = tmp_path / "said.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": p.prompt, "output": " ".join(p.answer(100))}) + "\n" for p in problems)
    )
    html = tmp_path / "said.html"
    given = ["analyze", *SMALL, "--dataset", str(data), "--json"]
    assert main([*given, "--texts", "2", "--max-tokens", "150", "--html", str(html)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [(text["prompt"], text["tokens"]) for text in found["texts"]] == [(78, 150), (78, 150)]
    assert found["heads_of_same_kind_in_two_texts"]["share"] <= 1
    assert found["intervals"]["over"] == "tokens"
    page = html.read_text()
    assert page.count("<svg") == 10  # six of the legend, four drawings
    assert page.count("<title>layer") == 8
    assert "<script" not in page and "said.jsonl, line 2" in page
    assert main([*given, "--layers", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["texts"]), found["layers"], found["intervals"]["over"]) == (3, [1], "texts")


def test_it_draws_and_suggests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    png, spec = tmp_path / "said.png", tmp_path / "mine.yaml"
    assert main(["analyze", *SMALL, "--png", str(png), "--suggest", str(spec)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert f"kvpolicy apply {spec} builtin:tiny" in capsys.readouterr().err.replace("\n", " ")
    assert load_policy(str(spec)).name == "mine"
    assert main(["apply", str(spec), "-n", "80", "--set", "budget=32", "--must-evict", "-q"]) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["-n", "0"], "the prompt has 78 tokens, and with a window of 32"),
        (["--texts", "3"], "--texts says how many of a dataset's texts to read"),
        (["--dataset", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--dataset", "nowhere.jsonl", "-p", "hum"], "drop -p and -f"),
        (["--html", "nowhere/a.html"], "there is no folder nowhere"),
        (["-n", "0", "--suggest", "mine.yaml", "--window", "2", "--silence", "1"], "longer outputs"),
    ],
)
def test_mistakes_are_told(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", *given]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
