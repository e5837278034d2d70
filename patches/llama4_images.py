"""Llama 4 with its vision tower. An image's tokens come in the order of the text and attend as its words do."""

from dataclasses import replace

from kvpolicy.patches import llama4

ARCHITECTURE = replace(
    llama4.ARCHITECTURE,
    model_types=("llama4",),
    covers="Llama 4 Scout and Maverick, with images",
    decoder="language_model.model",
    image_token="image_token_id",
)
