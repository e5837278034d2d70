"""GLM-4.5 to 4.7: a few dense layers, then layers with experts; half of a head's channels are turned."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("glm4_moe",), covers="GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7")
