"""`kvpolicy tune`: what it shows and writes, and what it says of mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.cli.main import main
from kvpolicy.language import load_policy

PROMPT = "hum hum owl red tin sky fog hum hum hum owl"
SMALL = ["-p", PROMPT, "-n", "20", "--trials", "3", "--runs", "2", "--played", "8"]


def test_it_writes_a_policy_that_other_verbs_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "h2o", *SMALL, "--memory", "12KiB", "--set", "recent=6"]) == 0
    said, told = capsys.readouterr()
    assert "heavy   scaled to the memory" in said and "not searched: set to 6" in said
    assert "chosen" in said and "1 text, 12 tokens of prompt and at most 20 after it" in said
    assert "wrote h2o-tuned.yaml; try it: kvpolicy apply h2o-tuned.yaml builtin:tiny" in " ".join(told.split())
    policy = load_policy("h2o-tuned.yaml")
    assert (policy.name, policy.params["recent"].default.text) == ("h2o-tuned", "6")
    assert main(["validate", "h2o-tuned.yaml"]) == 0
    assert main(["explain", "h2o-tuned.yaml", "-m", "builtin:tiny", "-c", "12", "-n", "20"]) == 0
    capsys.readouterr()
    assert main(["tune", "h2o", *SMALL, "--memory", "12KiB"]) == 2
    assert "h2o-tuned.yaml exists; add --force to overwrite it" in " ".join(capsys.readouterr().err.split())


def test_a_dataset_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, target = tmp_path / "said.jsonl", tmp_path / "mine.yaml"
    lines = [{"prompt": PROMPT, "output": " red tin sky fog owl red tin sky"}, {"prompt": f"hum {PROMPT}"}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--dataset", str(data), "-n", "6", "--trials", "2", "--runs", "2", "--played", "4", "-o", str(target)]
    assert main(["tune", "window", *given, "--agreement", "50%", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [(text["prompt"], text["new_tokens"]) for text in found["texts"]] == [(12, 6), (13, 6)]
    assert found["goal"] == {"memory": None, "agreement": 0.5}
    assert found["chosen"]["digest"] == load_policy(str(target)).digest
    assert found["written"] == str(target)
    assert found["chosen"]["measured"]["agreement"]["value"] >= 0.5


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["h2o"], 2, "what should it suit?: give one, --memory 512MiB"),
        (["h2o", "--memory", "1MiB", "--agreement", "0.9"], 2, "ask for different things: give one"),
        (["h2o", "--agreement", "1.5"], 2, "a share above 0 and up to 1 is needed"),
        (["h2o", "--memory", "much"], 2, "is no size of memory"),
        (["dense", "--memory", "1MiB"], 2, "dense has no params"),
        (["h2o", "--memory", "1MiB", "--only", "weight"], 2, "--only weight: h2o has no such param"),
        (["h2o", "--memory", "1MiB", "--set", "weight=3"], 3, "there is no param `weight` to set"),
        (["h2o", "--memory", "1MiB", "-o", "nowhere/a.yaml"], 2, "there is no folder nowhere"),
        (["h2o", "--memory", "1MiB", "--texts", "3"], 2, "--texts says how many of a dataset's texts"),
        (["h2o", "--memory", "1MiB", "-p", "a", "-f", "b"], 2, "-p and -f both give a prompt"),
        (["h2o", "--memory", "1KB", "-p", PROMPT, "-n", "8"], 2, "no setting of h2o fits into 1,000 bytes"),
        (["h2o", "--memory", "1MiB", "-p", PROMPT, "-n", "900000"], 4, "this model knows"),
    ],
)
def test_mistakes_are_told(
    given: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", *given]) == code
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
