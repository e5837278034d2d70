"""OLMo 3: three sliding layers, then a full one; queries and keys are normalised."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("olmo3",),
    covers="OLMo 3 7B and 32B",
)
