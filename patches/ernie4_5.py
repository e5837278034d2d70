"""ERNIE 4.5: Llama's decoder with a rotation of neighbouring channels; with experts from some layer on."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("ernie4_5", "ernie4_5_moe"), covers="ERNIE 4.5 0.3B, 21B-A3B, 300B-A47B (text)"
)
