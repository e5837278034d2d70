"""StarCoder2: biases everywhere. Where `sliding_window` is set, as in the releases, it holds for every layer."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("starcoder2",),
    covers="StarCoder2 3B, 7B, 15B",
)
