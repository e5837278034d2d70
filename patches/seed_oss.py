"""Seed-OSS: Llama's decoder with biases on queries, keys and values."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("seed_oss",), covers="Seed-OSS 36B")
