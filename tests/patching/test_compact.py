"""positions: compact on models: keys are turned from where the model rotated them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from kvpolicy import apply, cache_for, compile_report, remove
from kvpolicy.attention import Rotation, turn
from kvpolicy.errors import CacheError, ModelError
from kvpolicy.language import loads_policy
from kvpolicy.runtime import PolicyCache
from kvpolicy.testing.live import LiveAgreement

ROOMY = "pools: {all: {admit: all}}"
STREAMING = "pools: {all: {admit: all, budget: 10, pinned: {first: 2}, window: 8}}"
SCORED = "pools: {all: {admit: all, budget: 12, scorer: {signal: attention, queries: {last: 4}}}}"


def compact(pools: str, top: str = "") -> Any:
    return loads_policy(f"kvpolicy: 1\nname: test\npositions: compact\n{top}\n{pools}\n")


def test_a_turn_undoes_what_a_model_did_at_any_position() -> None:
    """Angles of float32 are off by up to 0.004 rad at 100,000; both ends are off alike."""
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, 64, 2) / 64))
    places, vectors = torch.tensor([0, 7, 4_000, 99_999]), torch.randn(4, 64)
    rotated = turn(vectors, torch.zeros(4, dtype=torch.int64), places, frequencies)
    angles = (places[:, None].float() * frequencies)[0:, :]
    own = torch.cat([vectors[:, :32], vectors[:, 32:]], -1) * angles.cos().repeat(1, 2)
    own += torch.cat([-vectors[:, 32:], vectors[:, :32]], -1) * angles.sin().repeat(1, 2)
    torch.testing.assert_close(rotated, own)
    back = turn(rotated, places, torch.arange(4), frequencies)
    torch.testing.assert_close(back, turn(vectors, torch.zeros(4, dtype=torch.int64), torch.arange(4), frequencies))


@pytest.mark.parametrize("more", [{}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}])
def test_with_room_for_all_nothing_changes(build: Any, family: str, prompt: Any, greedy: Any, more: dict) -> None:
    model = build(family, **more)
    ids = prompt[:1]
    plain = model.generate(ids, output_logits=True, return_dict_in_generate=True, **greedy)
    if not hasattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb"):  # Qwen2.5-VL until transformers 5.17
        with pytest.raises(ModelError, match="does it otherwise"):
            apply(model, compact(ROOMY))
        return
    apply(model, compact(ROOMY))
    ours = model.generate(ids, output_logits=True, return_dict_in_generate=True, **greedy)
    assert torch.equal(plain.sequences, ours.sequences)
    for one, other in zip(plain.logits, ours.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_padded_batch_of_turns_with_room_for_all(model: Any, padded: Any) -> None:
    """The same as the unpatched model, which is told each token's place in its row."""
    new, mask = torch.randint(2, 97, (2, 5), generator=torch.Generator().manual_seed(1)), padded["attention_mask"]
    later = torch.cat([mask, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])], 1)

    def logits(cache: Any) -> list[Any]:
        found = []
        for ids, seen in ((padded["input_ids"], mask), (new, later)):
            places = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            with torch.no_grad():
                out = model(ids, attention_mask=seen, position_ids=places, past_key_values=cache)
            found.append(out.logits[seen[:, -ids.shape[1] :].bool()])
            cache = out.past_key_values
        return found

    plain = logits(None)
    apply(model, compact(ROOMY, "prompt_chunk: 4"))
    ours = logits(cache_for(model, prompt=(5, 30), max_new_tokens=4, batch=2, turns=2))
    for one, other in zip(plain, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunk", ["", "prompt_chunk: 5"])
@pytest.mark.parametrize("pools", [STREAMING, SCORED])
def test_beside_the_oracle_on_a_model(model: Any, padded: Any, pools: str, chunk: str) -> None:
    apply(model, compact(pools, chunk))
    live = LiveAgreement(model, prompt=(11, 30), max_new_tokens=20, batch=2, turns=2)
    random = torch.Generator().manual_seed(2)
    mask = padded["attention_mask"]
    live.feed(padded["input_ids"], mask)
    for columns in (*[1] * 8, 6, *[1] * 8):
        mask = torch.cat([mask, torch.ones(2, columns, dtype=mask.dtype)], 1)
        live.feed(torch.randint(2, 97, (2, columns), generator=random), mask)
    assert live.cache.stats()["evicted"] > 0


@torch.no_grad()
def test_rows_are_rotated_where_they_stand_when_nobody_says_so(model: Any, padded: Any) -> None:
    """Without position_ids a model counts columns; what is turned must start where the cache thinks it does."""
    apply(model, compact(STREAMING))
    places = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    told, untold = (
        model(**padded, **more, past_key_values=cache_for(model, prompt=(11, 17), max_new_tokens=4, batch=2)).logits
        for more in ({"position_ids": places}, {})
    )
    valid = padded["attention_mask"].bool()
    torch.testing.assert_close(told[valid], untold[valid])


def test_compiled_steps_are_one_graph_a_kind(model: Any, prompt: Any, greedy: Any) -> None:
    apply(model, compact(SCORED), compile=False)
    eager = model.generate(prompt, **greedy)
    remove(model)
    apply(model, compact(SCORED), compile="aot_eager")
    assert torch.equal(model.generate(prompt, **greedy), eager)
    assert (compile_report(model).graphs, compile_report(model).graph_breaks) == (1, 0)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_refused(build: Any, kind: str) -> None:
    scaling = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        scaling |= {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 64}
    model = build(rope_parameters=scaling)
    with pytest.raises(ModelError, match=f"rope type {kind}"):
        apply(model, compact(STREAMING))
    apply(model, loads_policy(f"kvpolicy: 1\nname: test\n{STREAMING}"))


def test_a_model_that_rotates_otherwise_is_refused(model: Any, monkeypatch: Any) -> None:
    from transformers.models.llama import modeling_llama

    def interleaved(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        def rotated(x: Any) -> Any:
            pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            both = (at[..., : at.shape[-1] // 2].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim) for at in (cos, sin))
            return x * next(both) + pairs * next(both)

        return rotated(q), rotated(k)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    with pytest.raises(ModelError, match="otherwise"):
        apply(model, compact(STREAMING))


def test_a_cache_made_by_hand_must_know_the_rotation(model: Any) -> None:
    apply(model, compact(STREAMING))
    cache = cache_for(model, prompt=8, max_new_tokens=4)
    with pytest.raises(CacheError, match="rotation"):
        PolicyCache(cache.plan)
    PolicyCache(cache.plan, rotation=Rotation.none())
