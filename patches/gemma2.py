"""Gemma 2: sliding and full layers in turn, and logits that a tanh keeps below a cap."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("gemma2",),
    covers="Gemma 2, 2B to 27B",
)
