"""Cohere 2: three sliding layers, then a full one without rotation."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("cohere2",),
    covers="Command R7B, Command A",
)
