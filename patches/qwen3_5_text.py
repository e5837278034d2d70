"""Qwen3.5 without its vision tower: of four layers three keep a state for tokens, and are left alone."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("qwen3_5_text", "qwen3_5_moe_text"),
    covers="the text decoders of Qwen3.5, dense and with experts",
)
