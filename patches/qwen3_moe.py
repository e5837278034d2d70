"""Qwen3-MoE: Qwen3's attention, with experts in the layers that its config names."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen3_moe",),
    covers="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
)
