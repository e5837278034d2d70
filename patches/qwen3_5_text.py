"""Qwen3.5 without its vision tower: three layers of four keep a state in place of tokens, and no policy touches them."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen3_5_text", "qwen3_5_moe_text"),
    covers="the text decoders of Qwen3.5, dense and with experts",
)
