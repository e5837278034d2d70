"""Hunyuan V1: queries and keys are normalised after their rotation; with experts in its MoE releases."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("hunyuan_v1_dense", "hunyuan_v1_moe"),
    covers="Hunyuan 0.5B to 7B, Hunyuan-A13B, Hunyuan-MT",
)
