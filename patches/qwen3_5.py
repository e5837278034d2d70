"""Qwen3.5 with its vision tower, as it is published: the decoder of `qwen3_5_text` behind positions of three axes."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen3_5", "qwen3_5_moe"),
    covers="Qwen3.5, dense and with experts, with images and videos",
    decoder="language_model",
    image_token="image_token_id",
)
