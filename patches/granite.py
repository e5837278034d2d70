"""Granite: Llama's decoder with multipliers, one of them the scale of attention; with experts, in its MoE releases."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("granite", "granitemoe", "granitemoeshared"),
    covers="Granite 3.0 to 3.3, and the 1B and 3B with experts; the hybrid Granite 4 is another family",
)
