"""OLMo Hybrid: three layers of four keep a state in place of tokens, and no policy touches them."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("olmo_hybrid",), covers="OLMo Hybrid 7B")
