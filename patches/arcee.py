"""Arcee: Llama's attention; the feed-forward squares what is above zero."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("arcee",), covers="AFM 4.5B")
