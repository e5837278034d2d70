"""Apertus: Llama's decoder with norms of queries and keys, and an activation of its own."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("apertus",), covers="Apertus 8B and 70B")
