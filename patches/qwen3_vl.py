"""Qwen3-VL: a vision tower before Qwen3's decoder, which also adds pictures to what its first layers put out. Tokens
stand at three positions each; a policy counts them in the order of the text, and keys keep their rotation."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    covers="Qwen3-VL, dense and with experts",
    decoder="language_model",
    image_token="image_token_id",
)
