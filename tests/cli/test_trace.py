"""`kvpolicy trace`: the file, the account, exit codes, and that other verbs take what it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.cli.main import main
from kvpolicy.cli.trace import read_layers
from kvpolicy.errors import UsageError
from kvpolicy.testing.traces import read_trace

PROMPT = "hum owl red tin sky fog hum hum owl"


def test_it_writes_a_trace_and_says_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiny.safetensors"
    assert main(["trace", "-p", PROMPT, "-n", "20", "--layers", "1", "-o", str(out)]) == 0
    said, notes = capsys.readouterr()
    assert f"trace    {out}, " in said and "10 prompt, 20 new (as many as asked for)" in said
    assert said.splitlines()[-1].split() == ["layers", "1"]
    assert "1 layers of builtin:tiny, at most" in notes and f"--trace {out}" in notes
    text = read_trace(out)
    assert (text.prompts, text.steps, text.geometry.layers) == ((10,), 20, 1)


def test_json_goes_to_stdout_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiny.safetensors"
    assert main(["trace", "-p", PROMPT, "-n", "5", "--temperature", "1", "--seed", "3", "-o", str(out), "--json"]) == 0
    said, notes = capsys.readouterr()
    found: dict[str, Any] = json.loads(said)
    assert found["text"] in notes and found["bytes"] == out.stat().st_size
    assert {name: found[name] for name in ("schema_version", "path", "model", "layers", "new_tokens", "seed")} == {
        "schema_version": 1, "path": str(out), "model": "builtin:tiny", "layers": [0, 1], "new_tokens": 5, "seed": 3,
    }  # fmt: skip


def test_a_policys_test_replays_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "-p", PROMPT, "-n", "20", "-o", str(tmp_path / "tiny.safetensors"), "-q"]) == 0
    spec = tmp_path / "mine.yaml"
    spec.write_text(
        "kvpolicy: 1\nname: mine\npools:\n  all: {admit: all, budget: 8, window: 4, scorer: {signal: attention}}\n"
        "tests:\n- name: the window stays\n  attention: {trace: tiny.safetensors, layers: 1, steps: 12}\n"
        "  expect: [{keeps: window, of: 4}, {resident: 8}, {mass: {mean: 10%}}]\n"
    )
    assert main(["test", str(spec)]) == 0
    assert main(["test", str(spec), "--runtime"]) == 0
    spec.write_text(spec.read_text().replace("10%", "99.9%"))
    assert main(["test", str(spec)]) == 1
    assert "of the full cache's attention is attended, on average at least 0.999 claimed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--layers", "one"], 2, "--layers 'one': `one` is no layer; write it as in 0..3 or 0,7,15"),
        (["--layers", "3..1"], 2, "the range 3..1 is empty"),
        (["--layers", "2"], 4, "layer 2 is not there; this model's layers are 0..1"),
        (["-o", "/nowhere/trace.safetensors"], 2, "cannot write the trace to /nowhere/trace.safetensors"),
        (["-o", "."], 2, "it is a folder; name a file in it"),
        (["-p", " "], 2, "the prompt is empty"),
        (["-n", "99999999"], 4, "positions, and a prompt of 10 tokens with 99999999 new ones needs more"),
        (["--temperature", "-1"], 2, "--temperature"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], code: int, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"-p": PROMPT, "-n": "3", "-o": str(tmp_path / "x")} | dict(
        zip(arguments[::2], arguments[1::2], strict=True)
    )
    assert main(["trace", *(word for pair in given.items() for word in pair)]) == code
    said, notes = capsys.readouterr()
    assert not said and reason in notes and "Traceback" not in notes
    assert not list(tmp_path.iterdir())


def test_layers_are_written_as_ranges_and_lists() -> None:
    assert read_layers(None) == ()
    assert read_layers("0..2, 7,5") == (0, 1, 2, 5, 7)
    with pytest.raises(UsageError):
        read_layers("")


def test_an_interrupted_recording_is_whole_up_to_there(tmp_path: Path) -> None:
    out = tmp_path / "tiny.safetensors"
    command = [sys.executable, "-m", "kvpolicy", "trace", "-p", PROMPT, "-n", "4000", "-o", str(out)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy(),
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.read(20)  # it is writing
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and "(interrupted)" in said
    text = read_trace(out)
    assert 0 < text.steps < 4000 and text.queries[0][0].shape[1] == 10 + text.steps
