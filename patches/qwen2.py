"""Qwen2: Llama's decoder with biases on queries, keys and values. All common releases leave sliding windows off."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen2",),
    covers="Qwen2 and 2.5 (Math and Coder too), QwQ, Marco-o1, DeepSeek-R1-Distill-Qwen, DeepScaleR",
)
