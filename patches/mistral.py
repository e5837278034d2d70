"""Mistral: Llama's decoder. Where `sliding_window` is set, it holds for every layer, and no policy may touch them."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("mistral",),
    covers="Mistral 7B v0.2 and v0.3, Mistral Nemo, Mathstral; v0.1 has a window of 4,096 tokens",
)
