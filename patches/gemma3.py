"""Gemma 3: five sliding layers, then a full one, each kind with a rotation of its own. Text alone."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("gemma3_text",),
    covers="Gemma 3 1B, and the text decoders of the larger ones",
)
