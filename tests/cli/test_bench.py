"""`kvpolicy bench`: what it prints, writes and compares, and how wrong input is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.cli.bench import AGAINST, numbers, share, size
from kvpolicy.cli.main import main

QUICK = ["-m", "builtin:tiny", "-c", "160", "--budget", "48", "-n", "8", "--rounds", "2", "--no-launches"]


def test_one_run_is_shown_saved_and_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    saved, drawn = tmp_path / "r.json", tmp_path / "r.png"
    words = ["bench", "window", "h2o", *QUICK, "--save", str(saved), "--plot", str(drawn)]
    assert main([*words, "--against", "dense,dense-at-budget,hf-flex", "--memory", "50MB"]) == 0
    out, err = capsys.readouterr()
    for word in (
        "Equal batch",
        "What a step is made of",
        "Equal memory: the largest batch in 50.0 MB",
        "hf-flex is left",
    ):
        assert word in out
    assert "h2o holds 48 tokens by --set heavy=24 --set recent=24" in out and "reads" in err
    assert drawn.read_bytes().startswith(b"\x89PNG")
    told = json.loads(saved.read_text())
    assert told["kvpolicy_bench"] == 1 and len(told["rows"]) == 4
    assert {"torch", "transformers", "device", "threads", "date"} <= set(told["environment"])
    assert told["command"].startswith("kvpolicy ")


def test_json_and_a_comparison_that_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A saved report whose ratios nobody can reach makes the next run a failure, after it was shown in full."""
    saved = tmp_path / "r.json"
    words = ["bench", "window", *QUICK, "--json"]
    assert main([*words, "--save", str(saved)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema_version"] == 1 and "kvpolicy_bench" not in told
    assert main([*words, "--compare", str(_changed(saved, 1e-6))]) == 0
    found = json.loads(capsys.readouterr().out)["comparison"]
    assert found["worse"] == 0 and len(found["changes"]) == 3 and found["only_now"] == []
    assert main([*words, "--compare", str(_changed(saved, 1e12)), "--max-regress", "20%"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["comparison"]["worse"] == 3
    assert "3 of 3 ratios fell by more than 20.0%" in err


def _changed(file: Path, factor: float) -> Path:
    told: dict[str, Any] = json.loads(file.read_text())
    for row in told["rows"]:
        row["ratios"] = {name: ratio * factor for name, ratio in row["ratios"].items()}
    file.write_text(json.dumps(told))
    return file


def test_params_instead_of_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "bench",
        "streaming-llm",
        *QUICK,
        "--budget",
        "own",
        "--set",
        "sinks=2",
        "--set",
        "window=30",
        "--against",
        "none",
    ]
    assert main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["held"] == 32 and row["budget"] is None and row["ratios"] == {}


def test_a_shape_with_fewer_layers_and_growth(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "window", "--layers", "1", "--seen", "40,60", "--budget", "16", "-n", "4", "--against", "none"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "smollm2-135m, 1 layers, random weights, float32" and told["rows"] == []
    assert told["growths"][0]["seen"] == [40, 60]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["window", "--against", "hf-statik"], 2, "hf-static"),
        (["window", "--batch", "0"], 2, "--batch"),
        (["window", "--context", "many"], 2, "--context"),
        (["window", "--new-tokens", "8,16"], 2, "one number"),
        (["window", "--backend", "cuda"], 2, "--backend 'cuda'"),
        (["window", "--shape", "lama-3.1-8b"], 4, "llama-3.1-8b"),
        (["window", "-m", "builtin:tiny", "--shape", "qwen3-8b"], 2, "do not go together"),
        (["window", "--layers", "31"], 2, "1..30 layers"),
        (["window", "--seen", "8,4"], 2, "the smaller first"),
        (["window", "--memory", "lots"], 2, "80GB"),
        (["window", "--max-regress", "200%", "--compare", "none.json"], 2, "no share"),
        (["window", "--max-regress", "5%"], 2, "give one with --compare"),
        (["window", "--set", "windo=3"], 3, "window"),
        (["window", "tova", "--set", "beta=3"], 2, "none of window, tova"),
        (["window", "--compare", "none.json"], 2, "no such file"),
        (["window", "--save", "none/r.json"], 2, "no folder"),
        (["nothing-like-it"], 3, "nothing-like-it"),
        (["dense", *QUICK], 2, "--against dense"),
        (["window", *QUICK, "--budget", "160"], 2, "leave nothing to evict"),
        (["raas", *QUICK, "-c", "2k", "--budget", "40"], 2, "raas keeps at most 40 tokens in all"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == code
    out, err = capsys.readouterr()
    assert said in err.replace("\n", " ") and "Traceback" not in err and out == ""


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("kvpolicy.lab.chart.find_spec", lambda name: None)
    assert main(["bench", "window", "--plot", "r.png"]) == 5
    assert "kvpolicy[plot]" in capsys.readouterr().err


def test_the_command_line_knows_every_reference() -> None:
    from kvpolicy.lab.bench import arms

    assert AGAINST == arms.AGAINST


def test_numbers_as_people_write_them() -> None:
    assert numbers("1k,512,1k", "--budget") == [1024, 512]
    assert [share("5%"), share(".05")] == [0.05, 0.05]
    assert [size("80GB"), size("1.5 MiB"), size("2kb")] == [80_000_000_000, 1_572_864, 2000]
