"""Ministral: Mistral with full layers among the sliding ones."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("ministral",),
    covers="Ministral 8B",
)
