"""Llama: the decoder the others descend from. Every layer attends to the whole text."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("llama",),
    covers="Llama 1, 2, 3, 3.1, 3.2 (text), SmolLM2, DeepSeek-R1-Distill-Llama, and all that say model_type llama",
)
