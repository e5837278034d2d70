"""Qwen3: Qwen2 without biases, and with queries and keys normalised per head before rotation."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen3",),
    covers="Qwen3, all dense sizes",
    # A saved config carries its layer_types, so use_sliding_window=False alone changes nothing.
    way_out="load it with sliding_window=None and layer_types=['full_attention'] * config.num_hidden_layers",
)
