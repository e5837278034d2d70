"""MiniMax-M2: experts in every layer, queries and keys normalised over all heads at once."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("minimax_m2",), covers="MiniMax-M2, M2.1")
