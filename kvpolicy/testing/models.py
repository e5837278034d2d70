"""Tiny models with random weights, of any family that transformers knows: they prove mechanics, not quality."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MORE_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

SHARED = {**MORE_EXPERTS, "shared_expert_intermediate_size": 24}

LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
"""Of the 4 pairs of channels of a head, 2 are turned by time, 1 by height, 1 by width."""

SEEING: dict[str, Any] = {
    "vision_config": {  # one token of 4 x 4 pixels; what the first block has put out also enters the decoder
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 2,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        "out_hidden_size": 32,
        "initializer_range": 0.3,
    },
    "image_token_id": 94,
    "video_token_id": 93,
    "vision_start_token_id": 95,
    "vision_end_token_id": 96,
}

NEAR = ("sliding_attention", "full_attention")
STATEFUL = ("linear_attention", "full_attention")

OWN: dict[str, dict[str, Any]] = {
    "cohere2": {"decoder": {"sliding_window": 8}, "kinds": NEAR},
    "exaone4": {"decoder": {"sliding_window": 8, "sliding_window_pattern": 2}, "kinds": NEAR},
    "gemma2": {
        "decoder": {"sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0},
        "kinds": NEAR,
    },
    "gemma3": {
        "decoder": {"sliding_window": 8, "query_pre_attn_scalar": 8},
        "kinds": NEAR,
        "vision_config": {  # one token of 4 x 4 pixels, four to a picture
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
        "image_token_id": 94,
        "boi_token_index": 95,
        "eoi_token_index": 96,
    },
    "gemma3_text": {"decoder": {"sliding_window": 8, "query_pre_attn_scalar": 8}, "kinds": NEAR},
    "gpt_oss": {"decoder": {"sliding_window": 8, **EXPERTS}, "kinds": NEAR},
    "llama4_text": {
        "decoder": {
            "attention_chunk_size": 8,
            "no_rope_layer_interval": 2,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
        },
        "kinds": ("chunked_attention", "full_attention"),
    },
    "ministral": {"decoder": {"sliding_window": 8}, "kinds": NEAR},
    "olmo3": {"decoder": {"sliding_window": 8}, "kinds": NEAR},
    "cohere": {"decoder": {"logit_scale": 1.0, "use_qk_norm": True}},
    "ernie4_5_moe": {  # the first layer is dense
        "decoder": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1}
    },
    "flex_olmo": {"decoder": {"num_experts": 4, "num_experts_per_tok": 2}},
    "glm4_moe": {  # the first layer is dense
        "decoder": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "use_qk_norm": True}
    },
    "granite": {"decoder": {"attention_multiplier": 0.25, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}},
    "granitemoe": {"decoder": {"attention_multiplier": 0.25, **EXPERTS}},
    "granitemoeshared": {"decoder": {"attention_multiplier": 0.25, "shared_intermediate_size": 24, **EXPERTS}},
    "hunyuan_v1_moe": {"decoder": {"num_experts": 4, "moe_topk": 2}},
    "granitemoehybrid": {
        "decoder": {
            **EXPERTS,
            "shared_intermediate_size": 24,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "attention_multiplier": 0.25,
        },
        "kinds": STATEFUL,
    },
    "jamba": {
        "decoder": {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        }
    },
    "lfm2": {"kinds": ("conv", "full_attention")},
    "lfm2_moe": {"decoder": {**MORE_EXPERTS, "num_dense_layers": 1}, "kinds": ("conv", "full_attention")},
    "llava": {
        "decoder": {"model_type": "llama"},
        "vision_config": {  # one token of 4 x 4 pixels, four to a picture
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        "image_token_id": 94,
    },
    "minimax_m2": {"decoder": EXPERTS},
    "mistral": {"decoder": {"sliding_window": None}},
    "mixtral": {"decoder": EXPERTS},
    "olmo_hybrid": {"decoder": LINEAR, "kinds": STATEFUL},
    "olmoe": {"decoder": {"num_experts": 4, "num_experts_per_tok": 2}},
    "phimoe": {"decoder": EXPERTS},
    "qwen2_5_vl": {
        "decoder": {"rope_parameters": SECTIONS},
        "vision_config": {  # one token of 4 x 4 pixels
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 2,
            "temporal_patch_size": 1,
            "spatial_merge_size": 2,
            "window_size": 8,
            "fullatt_block_indexes": [0],
            "out_hidden_size": 32,
            "initializer_range": 0.3,
        },
        "image_token_id": 94,
        "video_token_id": 93,
        "vision_start_token_id": 95,
        "vision_end_token_id": 96,
    },
    "qwen2_moe": {"decoder": SHARED},
    "qwen3_5_moe_text": {"decoder": {**LINEAR, **SHARED}, "kinds": STATEFUL},
    "qwen3_5_text": {"decoder": LINEAR, "kinds": STATEFUL},
    "qwen3_next": {"decoder": {**LINEAR, **SHARED}, "kinds": STATEFUL},
    "qwen3_moe": {"decoder": {**MORE_EXPERTS, "mlp_only_layers": [1]}},
    "qwen3_vl": {"decoder": {"rope_parameters": SECTIONS}, **SEEING},
    "qwen3_vl_moe": {"decoder": {"rope_parameters": SECTIONS, **MORE_EXPERTS}, **SEEING},
    "smollm3": {"decoder": {"no_rope_layer_interval": 2}},
}
"""What a family's config must say beside the numbers that all have."""


def random_config(model_type: str, **changes: Any) -> Any:
    """The config of ``random_model``, which has a layer of every kind that the family is tested on."""
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
    own = OWN.get(model_type, {})
    shape = {**small, **own.get("decoder", {}), **changes}
    if "kinds" in own:
        kinds = cycle(own["kinds"])
        shape.setdefault("layer_types", [next(kinds) for _ in range(shape["num_hidden_layers"])])
    if "vision_config" not in own:
        return AutoConfig.for_model(model_type, **shape)
    beside = {key: value for key, value in own.items() if key not in ("decoder", "kinds")}
    return AutoConfig.for_model(model_type, text_config=shape, **beside)


def random_model(
    model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A language model of a family, one that sees where the family does, small enough for a test, in eval mode.

    Args:
        model_type: as transformers names it: "llama", "qwen3".
        changes: values of the decoder's config other than the small ones chosen here (3 layers, 4 query heads on 2 KV
            heads of size 8).
    """
    config = random_config(model_type, **changes)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # before transformers 5.21, sdpa left the caps out without a word
    loader = AutoModelForImageTextToText if "vision_config" in OWN.get(model_type, {}) else AutoModelForCausalLM
    torch.manual_seed(seed)
    model: PreTrainedModel = loader.from_config(config)
    return model.to(dtype).eval()
