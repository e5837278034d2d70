"""SmolLM3: Llama's decoder, in which every fourth layer turns no keys: positions compact are refused there."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("smollm3",),
    covers="SmolLM3 3B",
)
