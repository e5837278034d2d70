"""LFM2 with experts: most layers are short convolutions that keep their last few inputs, and no policy touches them."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("lfm2_moe",), covers="LFM2-8B-A1B", rotary="pos_emb")
