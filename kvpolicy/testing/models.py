"""Tiny models with random weights, of any family that transformers knows: they prove mechanics, not quality."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def random_model(
    model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A causal language model of a family, small enough for a test, in eval mode.

    Args:
        model_type: as transformers names it: "llama", "qwen3".
        changes: config values other than the small ones chosen here (3 layers, 4 query heads on 2 KV heads of size 8).
    """
    small = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 65536,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.3,  # attention that is far from uniform, so that what is evicted shows
    }
    if model_type == "mistral":
        small["sliding_window"] = None
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**small, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()
