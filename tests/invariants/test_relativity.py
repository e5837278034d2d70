"""What is kept stands where it stood: after an eviction the model answers as the full cache would, were it to look at
the kept tokens alone, each at its own position.

The reference is the model without a policy, whose attention is masked, by layer and KV head, to what the policy's cache
kept. The mutants are the ways in which caches have confused sequence length with stored length: each must show.
"""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import kvpolicy
from kvpolicy.attention import turn
from kvpolicy.attention.torch_prompt import attend_prompt
from kvpolicy.models import load_model
from kvpolicy.runtime import prompt_pass
from tests.invariants.policies import tight

PROMPT, SUFFIX = 24, 5
MODELS = ["builtin:tiny", pytest.param("builtin:smollm2", marks=pytest.mark.smollm2)]
SOMETIMES = ["builtin:tiny", pytest.param("builtin:smollm2", marks=[pytest.mark.smollm2, pytest.mark.slow])]
POLICIES = ["streaming-llm", "h2o", "raas", "snapkv"]


def kept_only(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any, kept: Any, **others: Any
):
    """Attention of N new tokens to those of the earlier ones that are in ``kept``, by layer [B, K, T - N], and among
    themselves. Shapes as transformers gives them."""
    new, past = query.shape[2], key.shape[2] - query.shape[2]
    earlier = kept[module.layer_idx][:, :, None].expand(-1, -1, new, -1)
    among = torch.ones(new, new, dtype=torch.bool).tril().expand(*earlier.shape[:2], -1, -1)
    groups = query.shape[1] // key.shape[1]
    seen = torch.cat([earlier[..., :past], among], dim=-1).repeat_interleave(groups, dim=1)
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return output.transpose(1, 2), None


AttentionInterface.register("kept-only", kept_only)
AttentionMaskInterface.register("kept-only", sdpa_mask)


class Pair:
    """A model under a policy, and the same under the full cache that looks at what the first has kept."""

    def __init__(self, model: Any, policy: Any, steps: int) -> None:
        self.patched = kvpolicy.apply(copy.deepcopy(model), policy)
        self.dense = copy.deepcopy(model)
        self.dense.set_attn_implementation("kept-only")
        lengths = {
            "prompt": (PROMPT, PROMPT + SUFFIX),
            "max_new_tokens": steps,
            "turns": 2,
        }  # within what `tight` takes
        self.gone = 0
        self.cache, self.full = kvpolicy.cache_for(self.patched, **lengths), DynamicCache(config=model.config)

    def kept(self) -> dict[int, Tensor]:
        """By layer, which of the tokens so far each KV head still has [1, K, T]."""
        seen = self.cache.get_seq_length()
        return {
            layer: (self.cache.positions(layer)[..., None] == torch.arange(seen)).any(2)
            for layer in range(len(self.cache.layers))
        }

    @torch.no_grad()
    def feed(self, ids: Tensor, mutant: Any = None) -> float:
        """One pass through both; returns how far their logits are apart, in units of the largest."""
        seen, kept = self.cache.get_seq_length(), self.kept()
        self.gone = seen - int(kept[0][0, 0].sum())
        places = torch.arange(seen, seen + ids.shape[1])[None]
        expected = self.dense(ids, past_key_values=self.full, position_ids=places, kept=kept).logits
        told = places if mutant is None else mutant(self, places)
        got = self.patched(ids, past_key_values=self.cache, position_ids=told).logits
        return float((got - expected).abs().max() / expected.abs().max())

    def keys(self, to: Any) -> None:
        """Turn every stored key from its position to another."""
        frequencies = self.patched.model.rotary_emb.inv_freq
        for part in self.cache.parts():
            place = part.positions().clamp(min=0)
            part.state.keys.copy_(turn(part.state.keys, place, to(place), frequencies))


def length_for_position(pair: Pair, places: Tensor) -> Tensor:
    """The next token stands where the stored ones end."""
    return places - pair.gone


def keys_shifted(pair: Pair, places: Tensor) -> Tensor:
    """Keys move up by as many tokens as were evicted."""
    pair.keys(lambda place: (place + pair.gone).clamp(max=pair.cache.get_seq_length() - 1))
    return places


def keys_by_rank(pair: Pair, places: Tensor) -> Tensor:
    """Keys are turned to where they lie among those that are left; the query is not."""
    pair.keys(lambda place: place.argsort(-1).argsort(-1))
    return places


def written_beside(pair: Pair, places: Tensor) -> Tensor:
    """A write of several tokens that goes round the end of a ring: keys lie one slot beside their values."""
    for part in pair.cache.parts():
        part.state.keys.copy_(part.state.keys.roll(1, dims=2))
    return places


def causal_by_count(query: Tensor, keys: Tensor, values: Tensor, query_position: Tensor, *others: Any) -> Tensor:
    """`is_causal` with more keys than queries: the first of the new queries sees the first key alone."""
    first = query_position.min(-1, keepdim=True).values
    return attend_prompt(query, keys, values, query_position - first, *others)


MUTANTS = [length_for_position, keys_shifted, keys_by_rank, written_beside]


def run(name: str, model: str, passes: Sequence[int], mutant: Any = None) -> list[float]:
    """A prompt and then passes of so many tokens each: how far off each is. A mutant strikes in the last pass."""
    loaded, tokenizer = load_model(model, device="cpu")
    text = tokenizer("hum owl red tin the harbour master kept three ledgers and sky fog " * 12, return_tensors="pt")
    pair, off, at = Pair(loaded, tight(name), len(passes)), [], 0
    for number, columns in enumerate((PROMPT, *passes)):
        ids, at = text.input_ids[:, at : at + columns], at + columns
        off.append(pair.feed(ids, mutant if number == len(passes) else None))
    assert pair.gone > 0
    return off


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_left_answers_as_the_full_cache_that_looks_at_nothing_else(name: str, model: str) -> None:
    """Over a prompt, generated tokens, a second turn of several tokens, and generated tokens again."""
    assert max(run(name, model, [*[1] * 12, SUFFIX, *[1] * 12])) < 1e-4


@pytest.mark.parametrize("model", SOMETIMES)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_known_way_to_confuse_positions_shows(mutant: Any, model: str) -> None:
    *before, struck = run("streaming-llm", model, [*[1] * 8, SUFFIX, 1], mutant)
    assert max(before) < 1e-4 and struck > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_a_mask_that_counts_from_the_first_key_shows(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_pass, "attend_prompt", causal_by_count)
    *before, struck = run("streaming-llm", model, [*[1] * 8, SUFFIX])
    assert max(before) < 1e-4 and struck > 1e-3
