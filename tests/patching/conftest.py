"""Tiny random models of every family, and small policies that evict early."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvpolicy.language import loads_policy
from kvpolicy.testing.models import OWN


def qwen2_5_vl_config(**text):
    """The shape of the others' decoders, behind a small vision tower."""
    own = dict(OWN["qwen2_5_vl"])
    whole = {name: text.pop(name) for name in ("attn_implementation",) if name in text}
    return Qwen2_5_VLConfig(text_config={**text, **own.pop("decoder")}, **own, **whole)


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_5_vl": (qwen2_5_vl_config, Qwen2_5_VLForConditionalGeneration, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
}

TEXTS = {
    "everything": "pools: {all: {admit: all}}",
    "window": "pools: {all: {admit: all, budget: 12, pinned: {first: 2}, window: 4}}",
    "scored": """
pools:
  prompt:
    admit: prompt
    budget: 8
    window: 2
    scorer: {signal: attention, queries: all, memory: sum}
    update: prompt-end
  generated: {admit: generated, budget: 6, window: 2, scorer: {signal: attention, memory: sum}, update: {every: 4}}
""",
    "paged": """
pools:
  prompt: {admit: prompt, page: 4}
  generated:
    admit: generated
    page: 4
    budget: 12
    scorer: {signal: page-bound, heads: max, hit: {top: 50%}, memory: last-hit}
""",
}


def tiny(family="llama", seed=0, **changes):
    """A model with 3 layers, 4 query and 2 KV heads, and no end-of-text token."""
    config_class, model_class, own = FAMILIES[family]
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.3,  # attention that is far from uniform, so that what is evicted shows
    }
    torch.manual_seed(seed)
    return model_class(config_class(**{**shape, **own, **changes})).eval()


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def build():
    return tiny


@pytest.fixture
def model(build):
    return build()


@pytest.fixture
def policies():
    return {name: loads_policy(f"kvpolicy: 1\nname: {name}\n{text}", filename=name) for name, text in TEXTS.items()}


@pytest.fixture
def prompt():
    """Token ids [2, 17], none of them a pad or a special token."""
    return torch.randint(2, 97, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def padded(prompt):
    """A left-padded batch: the second row has 11 tokens of 17."""
    mask = torch.ones_like(prompt)
    mask[1, :6] = 0
    return {"input_ids": prompt * mask, "attention_mask": mask}


@pytest.fixture
def greedy():
    return {"do_sample": False, "max_new_tokens": 24}
