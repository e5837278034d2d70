"""LFM2: most layers are short convolutions that keep their last few inputs, and no policy touches them."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("lfm2",), covers="LFM2 350M to 2.6B, LFM2.5")
