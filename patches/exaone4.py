"""EXAONE 4: sliding layers with rotation, full layers without."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("exaone4",),
    covers="EXAONE 4.0 1.2B and 32B",
)
