"""Qwen2: Llama's decoder with biases on queries, keys and values. All common releases leave sliding windows off."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen2",),
    covers="Qwen2 and 2.5 (Math and Coder too), QwQ, Marco-o1, DeepSeek-R1-Distill-Qwen, DeepScaleR",
    # A saved config carries its layer_types, so use_sliding_window=False alone changes nothing.
    way_out="load it with sliding_window=None and layer_types=['full_attention'] * config.num_hidden_layers",
)
