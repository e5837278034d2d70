"""LLaVA: a vision tower and a projector before a decoder that is another family's, Llama's, Mistral's or Qwen2's."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("llava",),
    covers="LLaVA 1.5, Pixtral 12B, and what else says model_type llava",
    decoder="language_model",
    image_token="image_token_id",
)
