"""Recording: a trace holds exactly what a stock model attended with, and the model is none the wiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy.architecture import architecture_of, architectures
from kvpolicy.errors import ModelError, UsageError
from kvpolicy.lab import recording
from kvpolicy.lab.recording import Recorded, record
from kvpolicy.lab.running import Request
from kvpolicy.language import load_policy, loads_policy
from kvpolicy.models import load_model
from kvpolicy.patching import listening
from kvpolicy.patching.checks import decoder_layers
from kvpolicy.plan import ModelGeometry
from kvpolicy.testing.feeding import OracleAlone, RuntimeBeside, plan_for, watch
from kvpolicy.testing.full_cache import FullCache
from kvpolicy.testing.models import random_model
from kvpolicy.testing.trace_file import TraceWriter
from kvpolicy.testing.traces import Trace

PROMPT = "hum owl red tin sky fog hum hum owl"
DENSE = "kvpolicy: 1\nname: dense\npools:\n  all: {admit: all}\n"


class Letters:
    """A tokenizer for models with random weights: a letter a token."""

    pad_token_id = 0
    eos_token_id = None

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[ord(letter) % 90 + 3 for letter in text]]))

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(int(token) + 30) for token in ids)


def recorded(model: Any, folder: Path, tokens: int = 12, **given: Any) -> tuple[Recorded, Trace]:
    options = {name: given.pop(name) for name in ("temperature", "seed") if name in given}
    path = folder / "trace.safetensors"
    tokenizer = given.pop("tokenizer", Letters())
    outcome = record(model, tokenizer, "random", Request(PROMPT, tokens, **options), path, **given)
    assert [each.name for each in folder.iterdir()] == [path.name] and outcome.bytes == path.stat().st_size
    return outcome, Trace(path)


@contextmanager
def eager(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(before)


@torch.no_grad()
def own_attention(model: Any, ids: tuple[int, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """By layer: the model's own eager probabilities [Q, T, T] and what its attention gives [T, Q, D], in one pass."""
    outputs: list[np.ndarray] = []
    hooks = [
        getattr(layer.self_attn, "o_proj", getattr(layer.self_attn, "dense", None)).register_forward_pre_hook(
            lambda _, args: outputs.append(args[0][0].float().numpy())
        )
        for layer in decoder_layers(model, architecture_of(model.config.model_type))
    ]
    with eager(model):
        maps = model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    for hook in hooks:
        hook.remove()
    return [each[0].float().numpy() for each in maps], outputs


def check(model: Any, trace: Trace, tolerance: float, sample: int = 1) -> None:
    """Attention recomputed from a trace, and what a dense policy gives on it, are the model's own."""
    maps, outputs = own_attention(model, trace.about.token_ids[0])
    said = trace.text()
    full, group, length = FullCache(said), said.geometry.group, said.queries[0].shape[2]
    for index, layer in enumerate(trace.about.layers):
        for head in range(said.geometry.kv_heads):
            for newest in range(0, length, sample):
                own = maps[layer][head * group : (head + 1) * group, newest, : newest + 1].mean(axis=0)
                assert np.abs(full.probabilities(index, 0, head, newest) - own).max() < tolerance
    passes = 0
    for seen in watch(OracleAlone(plan_for(loads_policy(DENSE), said)), said):
        step, layer = seen.step, trace.about.layers[seen.step.layer]
        new = slice(0, said.prompts[0]) if step.kind == "prompt" else slice(seen.newest, seen.newest + 1)
        assert step.output is not None
        own_output = outputs[layer].reshape(length, -1, said.geometry.head_dim)[new]
        assert np.abs(step.output - own_output).max() < tolerance * max(1, np.abs(own_output).max())
        own_maps = maps[layer][seen.head * group : (seen.head + 1) * group, new, : seen.newest + 1]
        assert np.abs(step.probabilities[seen.head] - own_maps).max() < tolerance
        passes += 1
    assert passes == said.geometry.layers * said.geometry.kv_heads * (said.steps + 1)


@pytest.mark.parametrize("family", sorted(architectures()))
def test_attention_from_a_trace_is_the_models_own(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    shape = ModelGeometry.from_config(model.base_model.config)
    if shape.softcap or architectures()[family].sinks or architectures()[family].temperature:
        with pytest.raises(ModelError, match="caps its logits, has attention sinks or tempers its queries"):
            recorded(model, tmp_path)
        return
    layers = shape.governed
    outcome, trace = recorded(model, tmp_path)
    assert (outcome.prompt_tokens, outcome.new_tokens, outcome.ended) == (len(PROMPT), 12, "length")
    assert (outcome.layers, trace.about.layers, trace.about.model_type) == (layers, layers, family)
    assert trace.about.prompts == (len(PROMPT),)
    if not shape.states:  # beside layers that keep a state, attention is gated, or tells no maps
        check(model, trace, 2e-5)


def test_on_the_model_that_ships(tmp_path: Path) -> None:
    model, tokenizer = load_model("builtin:tiny", device="cpu")
    outcome, trace = recorded(model, tmp_path, tokenizer=tokenizer)
    check(model, trace, 2e-5)
    about = trace.about
    assert (
        " ".join(about.tokens[0])
        == tokenizer.decode(about.token_ids[0])
        == f"{tokenizer.decode(tokenizer(PROMPT).input_ids)} {outcome.text}"
    )
    assert about.digest and about.digest == recording.digest_of(model.config)


@pytest.mark.smollm2
def test_on_smollm2(tmp_path: Path) -> None:
    model, tokenizer = load_model("builtin:smollm2", device="cpu")
    _, trace = recorded(model, tmp_path, tokenizer=tokenizer, layers=(0, 17, 29), tokens=8)
    check(model, trace, 1e-4)


def test_another_scaling_and_sampling_are_carried_through(tmp_path: Path) -> None:
    model = random_model("llama")
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    _, trace = recorded(model, tmp_path, temperature=1.5, seed=3)
    assert trace.about.scaling == trace.text().scale == 0.5
    check(model, trace, 2e-5)
    said = trace.text(layers=(1,), steps=5)
    policy = load_policy("h2o", set={"heavy": 4, "recent": 4})
    kept = [
        [seen.kept() for seen in watch(feed(plan_for(policy, said)), said)] for feed in (OracleAlone, RuntimeBeside)
    ]
    assert kept[0] == kept[1] and len(kept[0][-1]) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_recorded_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_model("llama", dtype=dtype)
    heard: list[torch.Tensor] = []
    outcome, trace = recorded(model, tmp_path)
    assert trace.about.dtype == outcome.dtype == str(dtype).removeprefix("torch.")
    ids = torch.tensor([trace.about.token_ids[0]])
    with torch.no_grad(), listening(model, [1], lambda layer, q, k, v, scaling: heard.extend((q, k, v))):
        model(ids[:, : len(PROMPT)], use_cache=False)
    said = trace.text()
    for what, tensor in zip(("queries", "keys", "values"), heard, strict=True):
        assert np.array_equal(getattr(said, what)[0][1][:, : len(PROMPT)], tensor[0].float().numpy())
    values = 3 * (4 + 2 * 2) * 8 * (len(PROMPT) + 12)
    assert 2 * values < outcome.bytes < 2 * values + 2**14


def test_some_layers_are_recorded_alone(tmp_path: Path) -> None:
    model = random_model("llama")
    outcome, trace = recorded(model, tmp_path, layers=(2,))
    assert outcome.layers == trace.about.layers == (2,) and trace.about.model_layers == 3
    expected = recording.expected_bytes(model, (2,), len(PROMPT) + 12)
    assert expected < outcome.bytes < expected + 2**13
    check(model, trace, 2e-5)


def test_the_model_writes_as_ever_and_is_left_as_it_was(tmp_path: Path) -> None:
    model = random_model("qwen3")
    config, before = (
        model.config,
        {name: id(module.config) for name, module in model.named_modules() if hasattr(module, "config")},
    )
    ids = Letters()(PROMPT).input_ids
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    _, trace = recorded(model, tmp_path)
    assert trace.about.token_ids[0] == tuple(plain[0].tolist())
    assert model.config is config and config._attn_implementation == "sdpa"
    after = {name: id(module.config) for name, module in model.named_modules() if hasattr(module, "config")}
    assert after == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_no_more_than_a_pass_of_a_layer_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    append = TraceWriter.append

    def spy(self: TraceWriter, row: int, layer: int, what: str, array: np.ndarray) -> None:
        sizes.append(array.shape[0])
        append(self, row, layer, what, array)

    monkeypatch.setattr(TraceWriter, "append", spy)
    recorded(random_model("llama"), tmp_path)
    assert sizes == [len(PROMPT)] * 9 + [1] * 9 * 12


def test_a_text_that_ends_or_is_stopped_is_recorded_so_far(tmp_path: Path) -> None:
    model = random_model("llama")
    _, trace = recorded(model, tmp_path)
    ids = trace.about.token_ids[0][len(PROMPT) :]
    model.generation_config.eos_token_id = ids[5]
    ended, trace = recorded(model, tmp_path)
    last = ids.index(ids[5])
    assert (ended.ended, ended.new_tokens) == ("text", last) and trace.about.token_ids[0][len(PROMPT) :] == ids[:last]
    model.generation_config.eos_token_id = None
    asked = iter([False, False, False, *[True] * 99])
    stopped, trace = recorded(model, tmp_path, stop=lambda: next(asked))
    assert (stopped.ended, stopped.new_tokens, trace.text().steps) == ("interrupted", 3, 3)
    none, trace = recorded(model, tmp_path, tokens=0)
    assert (none.ended, none.new_tokens, none.text) == ("length", 0, "")


def test_later_columns_of_a_cache_in_chunks_are_heard_once() -> None:
    """A prompt in two passes is heard as in one."""
    model, heard = random_model("llama"), {False: [], True: []}  # type: ignore[var-annotated]
    ids = Letters()(PROMPT).input_ids

    def ear(chunked: bool) -> Callable[..., None]:
        return lambda layer, q, k, v, scaling: heard[chunked].append((layer, k))

    for chunked in (False, True):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), listening(model, [0, 2], ear(chunked)):
            for part in ids.split(20 if chunked else 99, dim=1):
                model(part, past_key_values=cache)
    joined = torch.cat([key for layer, key in heard[True] if layer == 2], dim=2)
    assert [layer for layer, _ in heard[True]] == [0, 2, 0, 2] and len(heard[False]) == 2
    assert torch.allclose(joined, heard[False][1][1], atol=1e-5)


def test_what_cannot_be_recorded_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    model = random_model("llama")
    for layers, reason in (
        ((3,), "layer 3 is not there; this model's layers are 0..2"),
        ((0, -1), "layer -1 is not there"),
    ):
        with pytest.raises(ModelError, match=reason):
            record(model, Letters(), "random", Request(PROMPT, 3), tmp_path / "x", layers)
    with pytest.raises(UsageError, match="cannot write the trace"):
        record(model, Letters(), "random", Request(PROMPT, 3), tmp_path / "none" / "x")
    with pytest.raises(ModelError, match="this model knows 65536 positions"):
        record(model, Letters(), "random", Request(PROMPT, 65536), tmp_path / "x")
    with kvpolicy.applied(model, "window", compile=False), pytest.raises(UsageError, match="without a policy"):
        record(model, Letters(), "random", Request(PROMPT, 3), tmp_path / "x")
    model.model.layers[1].self_attn.scaling = 0.5
    with pytest.raises(ModelError, match="layers of this model scale differently"):
        record(model, Letters(), "random", Request(PROMPT, 3), tmp_path / "x")
    assert not list(tmp_path.iterdir()) and model.config._attn_implementation == "sdpa"


def test_layers_with_a_sliding_window_are_left_out(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    model = random_model("qwen2", **window)
    outcome, trace = recorded(model, tmp_path)
    assert outcome.layers == (0, 1)
    check(model, trace, 2e-5)
    with pytest.raises(ModelError, match="layer 2 attends to the text nearby only"):
        record(model, Letters(), "random", Request(PROMPT, 3), tmp_path / "x", (2,))
    with pytest.raises(ModelError, match="all 3 layers of this mistral model attend to the last 8 tokens only"):
        record(random_model("mistral", sliding_window=8), Letters(), "random", Request(PROMPT, 3), tmp_path / "x")
