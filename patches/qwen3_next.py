"""Qwen3-Next: three layers of four keep a state in place of tokens, and no policy touches them; gates and experts."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("qwen3_next",), covers="Qwen3-Next 80B-A3B, Qwen3-Coder-Next")
