"""Qwen2-MoE: Qwen2's attention, with experts in most layers and one that all tokens share."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen2_moe",),
    covers="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
)
