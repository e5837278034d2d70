"""Qwen3: Qwen2 without biases, and with queries and keys normalised per head before rotation."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen3",),
    covers="Qwen3, all dense sizes",
)
