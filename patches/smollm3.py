"""SmolLM3: Llama's decoder, in which every fourth layer turns no keys: positions compact are refused there."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("smollm3",),
    covers="SmolLM3 3B",
    # A saved config carries its layer_types, so use_sliding_window=False alone changes nothing.
    way_out="load it with sliding_window=None and layer_types=['full_attention'] * config.num_hidden_layers",
)
