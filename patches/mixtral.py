"""Mixtral: Mistral's attention; each token's feed-forward is left to a few experts of many, which no policy sees."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("mixtral",),
    covers="Mixtral 8x7B, 8x22B",
)
