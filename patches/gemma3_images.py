"""Gemma 3 with a vision tower before it. Its images' tokens see one another in both directions, which no policy's cache
lets them: prompts are text alone."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("gemma3",),
    covers="Gemma 3 4B, 12B and 27B, on text",
    decoder="language_model",
    image_token="image_token_id",
    images_see_ahead=True,
)
