"""Qwen2.5-VL: a vision tower before Qwen2's decoder. Its tokens stand at three positions each, time, height and width;
a policy counts them in the order of the text, and keys keep the rotation that they came with."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen2_5_vl",),
    covers="Qwen2.5-VL, and what was trained from it: UI-TARS 1.5, MiMo-VL",
    decoder="language_model",
    image_token="image_token_id",
)
