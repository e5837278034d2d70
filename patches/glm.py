"""GLM-4: half of a head's channels are turned, in neighbouring pairs; the 0414 releases add norms around each block."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("glm", "glm4"),
    covers="GLM-4-9B, GLM-Edge; GLM-4-0414, GLM-Z1",
)
