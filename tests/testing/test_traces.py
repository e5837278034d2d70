"""Traces: written, read lazily, replayed through a policy, and named where they are wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.language import load_policy
from kvpolicy.language.base import Complaint
from kvpolicy.testing.feeding import OracleAlone, RuntimeBeside, plan_for, watch
from kvpolicy.testing.patterns import Attention, synthesize
from kvpolicy.testing.runner import run_tests
from kvpolicy.testing.trace_file import TraceWriter
from kvpolicy.testing.traces import About, Trace, read_trace, text_of, write_trace

SAID = {"pattern": "milestone", "at": 3, "until": 10, "prompt": [6, 4], "steps": 9, "layers": 3, "heads": 4}


def about(said: Attention, **changes: Any) -> About:
    shape = said.geometry
    plain = About(
        model="random",
        model_type="llama",
        model_layers=8,
        layers=(1, 2, 5),
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        scaling=said.scale,
        dtype="float32",
        prompts=said.prompts,
        steps=said.steps,
        token_ids=tuple(tuple(range(prompt)) for prompt in said.prompts),
        tokens=tuple(tuple("ab\nß…é"[: prompt - 1]) for prompt in said.prompts),
    )
    return replace(plain, **changes)


@pytest.fixture
def said() -> Attention:
    return synthesize(SAID)


@pytest.fixture
def file(tmp_path: Path, said: Attention) -> Path:
    path = tmp_path / "said.safetensors"
    size = write_trace(path, said, about(said))
    assert size == path.stat().st_size
    assert [each.name for each in tmp_path.iterdir()] == [path.name]  # nothing is left beside it
    return path


def test_what_was_written_is_read(file: Path, said: Attention) -> None:
    found = read_trace(file)
    assert (found.prompts, found.steps, found.scale, found.length) == ((6, 4), 9, said.scale, 13)
    assert replace(found.geometry, model_type="") == replace(said.geometry, model_type="")
    for what in ("queries", "keys", "values"):
        for row in range(2):
            assert np.array_equal(getattr(found, what)[row], getattr(said, what)[row])
            assert getattr(found, what)[row].shape == getattr(said, what)[row].shape
    assert Trace(file).about == about(said)


def test_others_can_read_it(file: Path, said: Attention) -> None:
    tensors = load_file(file)
    assert len(tensors) == 2 * 3 * 3
    assert np.array_equal(tensors["rows.1.layers.5.keys"], said.keys[1][2].swapaxes(0, 1))


def test_a_part_is_read_alone(file: Path, said: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    numbers = Trace.numbers
    monkeypatch.setattr(Trace, "numbers", lambda self, *where: read.append(where) or numbers(self, *where))
    found = read_trace(file, layers=(2, 5), rows=(1,), steps=3)
    assert (found.prompts, found.steps, found.geometry.layers) == ((4,), 3, 2) and not read
    assert np.array_equal(found.queries[0][1], said.queries[1][2][:, :7])
    assert np.array_equal(found.queries[0][1], said.queries[1][2][:, :7])
    assert read == [(1, 5, "queries", 7)]
    assert np.array_equal(np.asarray(found.values[0]), said.values[1][1:, :, :7])
    assert np.array_equal(found.values[0][-1], said.values[1][2][:, :7]) and len(found.values[0]) == 2


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_short_floats_are_rounded_to_nearest(tmp_path: Path, said: Attention, dtype: str, error: float) -> None:
    path = tmp_path / "short.safetensors"
    write_trace(path, said, about(said, dtype=dtype))
    found = read_trace(path)
    assert found.keys[0][0].dtype == np.float32
    off = np.abs(found.keys[0][0] - said.keys[0][0]) / np.maximum(np.abs(said.keys[0][0]), 1e-3)
    assert 0 < off.max() <= error
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        stored = load_file(path)["rows.0.layers.1.keys"]
        expected = torch.from_numpy(said.keys[0][0].copy()).bfloat16()
        assert torch.equal(torch.from_numpy(stored).view(torch.bfloat16).transpose(0, 1), expected)


@pytest.mark.parametrize("feed", [OracleAlone, RuntimeBeside])
@pytest.mark.parametrize(
    "settings", [{"name": "h2o", "heavy": 3, "recent": 3}, {"name": "raas", "budget": 12, "page_size": 2}]
)
def test_a_replayed_trace_is_the_text_itself(file: Path, said: Attention, feed: Any, settings: dict[str, Any]) -> None:
    policy = load_policy(settings["name"], set={name: value for name, value in settings.items() if name != "name"})
    kept = [[seen.kept() for seen in watch(feed(plan_for(policy, text)), text)] for text in (said, read_trace(file))]
    assert kept[0] == kept[1] and len(kept[0]) == 10 * 3 * 2 * 2
    assert all(len(each) < 13 for each in kept[0][-12:])


def test_the_scaling_is_the_models(tmp_path: Path, said: Attention) -> None:
    """A trace with twice the scaling is the text with queries twice as long, in the oracle as in the runtime."""
    path = tmp_path / "scaled.safetensors"
    write_trace(path, said, about(said, scaling=2 * said.scale))
    longer = replace(said, queries=tuple(row * np.float32(2) for row in said.queries))
    policy = load_policy("h2o").bind(heavy=3, recent=3)
    for feed in (OracleAlone, RuntimeBeside):
        kept = []
        for text in (read_trace(path), longer, said):
            seen = list(watch(feed(plan_for(policy, text)), text))
            kept.append(np.concatenate([each.step.probabilities[each.head].ravel() for each in seen]))
        assert np.allclose(kept[0], kept[1], atol=1e-6)
        assert kept[0].shape != kept[2].shape or not np.allclose(kept[0], kept[2], atol=1e-3)


POLICY = """
kvpolicy: 1
name: replayed
pools:
  all: {{admit: all, budget: 5}}
tests:
- name: the window slides
  attention: {attention}
  expect: [{{keeps: window, of: 5}}, {{resident: 5}}]
"""


def test_a_test_names_a_trace_beside_its_policy(file: Path) -> None:
    spec = file.parent / "policy.yaml"
    spec.write_text(POLICY.format(attention="{trace: said.safetensors, layers: 1..2, steps: 8}"))
    for runtime in (False, True):
        (outcome,) = run_tests(load_policy(spec), runtime=runtime)
        assert outcome.passed and outcome.evicted == 2 * 2 * (14 - 5 + 12 - 5)


WRONG = [
    ("{trace: sad.safetensors}", "sad.safetensors", "there is no file", "`kvpolicy trace"),
    ("{trace: policy.yaml}", "policy.yaml", "cannot be read", "record it anew"),
    ("{trace: 3}", "3", "`3` is no path", "as in `trace: "),
    ("{trace: said.safetensors, layers: 3}", "3", "layers 3 are not in this trace", "recorded were layers 1..2, 5"),
    ("{trace: said.safetensors, layers: 0..2}", "0..2", "layers 0 are not in this trace", ""),
    ("{trace: said.safetensors, rows: [1, 2]}", "[1, 2]", "rows 2 are not in this trace", "recorded were rows 0..1"),
    ("{trace: said.safetensors, steps: 10}", "10", "9 generated tokens were recorded", "`steps` is 0..9"),
    ("{trace: said.safetensors, layer: 1}", "layer", "`layer` is not an argument here", "did you mean `layers`?"),
]


@pytest.mark.parametrize(("attention", "culprit", "reason", "hint"), WRONG, ids=[wrong for wrong, *_ in WRONG])
def test_what_makes_no_sense_is_shown_at_its_place(
    file: Path, attention: str, culprit: str, reason: str, hint: str
) -> None:
    spec = file.parent / "policy.yaml"
    spec.write_text(POLICY.format(attention=attention))
    with pytest.raises(PolicyError) as caught:
        run_tests(load_policy(spec))
    (mistake,) = caught.value.diagnostics
    assert reason in mistake.reason and hint in mistake.hint
    assert mistake.snippet[mistake.column - 1 :][: mistake.width] == culprit


def test_a_file_that_is_no_trace_or_a_damaged_one_is_refused(file: Path, tmp_path: Path, said: Attention) -> None:
    tensors, meta = load_file(file), about(said).metadata()
    changes: list[tuple[dict[str, Any], dict[str, str] | None, str]] = [
        (tensors, None, "no trace"),
        (tensors, {**meta, "kvpolicy_trace": "2"}, "version 2, and this kvpolicy reads 1"),
        (tensors, {**meta, "steps": "many"}, "its metadata are damaged"),
        (tensors, {name: text for name, text in meta.items() if name != "scaling"}, "its metadata are damaged"),
        (tensors, {**meta, "dtype": json.dumps("int4")}, "its metadata make no sense"),
        (tensors, {**meta, "steps": "8"}, "rows.0.layers.1.queries is not as announced"),
        ({name: array for name, array in tensors.items() if "5.keys" not in name}, meta, "5.keys is not as announced"),
    ]
    for arrays, metadata, reason in changes:
        save_file(arrays, tmp_path / "damaged.safetensors", metadata=metadata)
        with pytest.raises(UsageError, match=reason):
            read_trace(tmp_path / "damaged.safetensors")
    whole = file.read_bytes()
    for stop in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:stop])
        with pytest.raises(UsageError, match=r"cannot be read: .*; record it anew"):
            read_trace(file)


def test_a_trace_that_cannot_be_written_says_so(tmp_path: Path, said: Attention) -> None:
    with pytest.raises(UsageError, match="cannot write the trace to"):
        write_trace(tmp_path / "nowhere" / "x.safetensors", said, about(said))


def test_what_was_not_finished_vanishes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TraceWriter(tmp_path / "x.safetensors", "float32") as writer:
        writer.append(0, 0, "keys", np.zeros((3, 2, 4), dtype=np.float32))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_pattern_is_a_text_too(said: Attention) -> None:
    assert np.array_equal(text_of(SAID, near="<string>").keys[1], said.keys[1])
    for arguments in ({"trace": "said.safetensors"}, {"trace": "said.safetensors", "pattern": "sink"}):
        with pytest.raises(Complaint):
            text_of(arguments, near="<string>")
