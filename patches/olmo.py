"""OLMo and OLMo 2: Llama's decoder; the second norms queries and keys, and norms a block's output and not its input."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("olmo", "olmo2"), covers="OLMo 1B and 7B, OLMo 2 1B to 32B")
