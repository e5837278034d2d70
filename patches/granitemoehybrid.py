"""Granite 4: most layers are Mamba-2 and keep a state in place of tokens, which no policy touches; few attend."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("granitemoehybrid",), covers="Granite 4.0 Micro, Tiny, Small")
