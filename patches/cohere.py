"""Cohere: attention and feed-forward side by side, and a rotation of neighbouring channels."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("cohere",), covers="Command R, Command R+, Aya 23, Aya Expanse")
