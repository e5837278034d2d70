"""Gemma 1: Llama's decoder with embeddings scaled, and heads wider than the hidden size would make them."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("gemma",), covers="Gemma 2B and 7B, Gemma 1.1, CodeGemma")
