"""Qwen2.5-VL: a vision tower before Qwen2's decoder. Its tokens stand at three positions each, time, height and width;
a policy counts them in the order of the text, and keys keep the rotation that they came with."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen2_5_vl",),
    covers="Qwen2.5-VL, and what was trained from it: UI-TARS 1.5, MiMo-VL",
    decoder="language_model",
    # A saved config carries its layer_types, so use_sliding_window=False alone changes nothing.
    way_out="set sliding_window=None and layer_types=['full_attention'] * num_hidden_layers in its text_config",
    image_token="image_token_id",
)
