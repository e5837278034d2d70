"""Phi-3.5-MoE: Phi-3 with experts, its queries, keys and values from matrices of their own."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("phimoe",),
    covers="Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE",
)
