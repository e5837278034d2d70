"""Phi-1 and 2: attention and feed-forward side by side, and a rotation of the first channels of a head alone."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("phi",), covers="Phi-1, Phi-1.5, Phi-2")
