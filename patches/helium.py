"""Helium: Llama's decoder with a rotation of neighbouring channels."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("helium",), covers="Helium 1 2B")
