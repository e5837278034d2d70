"""Long texts under every policy: what is judged, what is taken from an earlier run, and the short form of the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.lab import long_run
from kvpolicy.lab.long_run import Row, Setting, busy, judged, longest_run
from kvpolicy.language import load_policy
from kvpolicy.models import load_model
from kvpolicy.plan import ModelGeometry, make_plan
from kvpolicy.plan.timeline import timeline
from tests.invariants.policies import NAMES

ROW = Row("p", "d", "m", 100, 0, "True", "ok", "", {}, longest_run=3, variety=40, seconds=1.0)
SHORT = ("scope-discontinuous", "snapkv")
LLAMA = ModelGeometry("llama", 4, 4, 2, 8)


@pytest.fixture(scope="module")
def tiny() -> Setting:
    model, tokenizer = load_model("builtin:tiny", device="cpu")
    return Setting(model, "builtin:tiny", long_run.prompt_for("builtin:tiny", tokenizer), 1000, 0, "eager")


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "dense"]
)
def test_a_long_text_in_one_graph_a_kind(name: str, tiny: Setting) -> None:
    """With torch's eager backend, which traces and guards as Inductor does; kvpolicy.lab.long_run takes Inductor."""
    setting = tiny if name not in SHORT else dataclasses.replace(tiny, tokens=150)
    full, row = long_run.run(setting, [name])
    assert (full.policy, full.status) == ("dense", "ok")
    # A text of 1,000 tokens is five times what this model was trained on: what it babbles at is told, and is no fault.
    assert all("under the full cache" in each for each in row.why.split("; ") if row.why), row.why
    assert row.recompiles == 0 and row.graphs > 0
    assert row.evicted + row.moved > 0 or not any(pool.budget for pool in load_policy(name).pools.values())


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_halved_until_something_leaves_or_is_unread(name: str) -> None:
    small = busy(load_policy(name), LLAMA, 250, 1000)
    plan = make_plan(small, LLAMA, prompt=250, max_new_tokens=1000)
    reads = any(pool.read is not None for layer in plan.layers for pool in layer.pools)
    assert name == "dense" or reads or any(line.evicted for layer in plan.layers for line in timeline(plan, layer))


def test_runs_of_one_token() -> None:
    assert [longest_run(said) for said in ([], [7], [1, 2, 2, 2, 1, 1], [5, 5])] == [0, 1, 3, 2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"longest_run": 17}, "the same token 17 times in a row (under the full cache 3)"),
        ({"variety": 19}, "19 different tokens in the newest half (under the full cache 40)"),
        ({"status": "failed", "why": "2 recompiles"}, "2 recompiles"),
    ],
)
def test_what_is_babble(changes: dict[str, Any], says: str) -> None:
    row = judged(dataclasses.replace(ROW, **changes), ROW)
    assert row.status == "failed" and says in row.why


def test_what_is_not() -> None:
    assert judged(ROW, ROW) == ROW
    alike = dataclasses.replace(ROW, longest_run=60)
    assert judged(alike, dataclasses.replace(ROW, longest_run=31)) == alike
    refused = dataclasses.replace(ROW, status="refused", why="store", variety=0)
    assert judged(refused, ROW) == refused


def test_a_fault_of_one_policy_is_a_row_and_not_the_end(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    original = long_run.write

    def write(setting: Setting, policy: Any, sized: Any) -> Row:
        if policy.name == "window":
            raise RuntimeError("a second graph\nand its long story")
        return original(setting, policy, sized)

    monkeypatch.setattr(long_run, "write", write)
    short = dataclasses.replace(tiny, tokens=6, compile=False)
    full, window, tova = long_run.run(short, ["window", "tova"])
    assert (window.status, window.why) == ("failed", "RuntimeError: a second graph")
    assert (full.status, tova.status) == ("ok", "ok")


def test_a_second_run_goes_on_where_the_first_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "new" / "long.jsonl", []
    original = long_run.write

    def write(setting: Setting, policy: Any, sized: Any) -> Row:
        written.append(policy.name)
        return original(setting, policy, sized)

    monkeypatch.setattr(long_run, "write", write)
    words = ["--tokens", "12", "--compile", "no", "--out", str(out)]
    assert long_run.main(["window", *words]) == 0
    out.write_text(out.read_text() + '{"policy": "cut sh')
    assert long_run.main(["window", "tova", *words]) == 0
    assert written == ["dense", "window", "tova"]
    assert "[3/3] tova" in capsys.readouterr().out
    assert [row.policy for row in long_run.read(out)] == ["dense", "window", "tova"]
    assert json.loads(out.read_text().splitlines()[-1])["status"] == "ok"


def test_who_babbles_gets_more_room(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its sizes doubled as often as something is dropped still; its row tells what it did at its own."""
    seen: list[tuple[str, str]] = []

    def write(setting: Setting, policy: Any, sized: Any = None) -> Row:
        size = (sized or policy).params["window"].value.text if policy.name == "window" else ""
        seen.append((policy.name, size))
        run = 400 if policy.name == "window" and len(seen) < 4 else 2
        return setting.row(policy, "ok", small=sized, evicted=5, longest_run=run, variety=9, seconds=1.0)

    monkeypatch.setattr(long_run, "write", write)
    small = load_policy("window").bind(window=64)
    monkeypatch.setattr(long_run, "load_policy", lambda name: small if name == "window" else load_policy(name))
    long = dataclasses.replace(tiny, tokens=1000, compile=False)
    _, row = long_run.run(long, ["window"])
    assert [size for name, size in seen if name == "window"] == ["64", "2 * (64)", "4 * (64)"]
    assert row.status == "ok" and row.settings["window"] == "4 * (64)"
    assert row.why.startswith("at its own sizes: the same token 400 times in a row")
