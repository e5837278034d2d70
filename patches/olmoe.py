"""OLMoE and FlexOlmo: OLMo's attention, with experts in every layer."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("olmoe", "flex_olmo"), covers="OLMoE 1B-7B, FlexOlmo 7x7B")
