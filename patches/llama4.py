"""Llama 4: chunked layers with rotation, full layers without, experts."""

from typing import Any

from kvpolicy.architecture import Architecture


def temperature(attention: Any, position: Any) -> Any:
    """What layers without rotation multiply their queries by, so that long texts do not flatten their attention.

    The model's own code counts positions from the length of a cache that it is not handed here, so from 0 in each pass.
    """
    if attention.use_rope or not attention.attn_temperature_tuning:
        return None

    def scale(places: Any) -> Any:
        steps = ((places.clamp(min=0).float() + 1.0) / attention.floor_scale).floor()
        return steps.log1p() * attention.attn_scale + 1.0

    counted = position.new_ones(position.shape[1]).cumsum(0) - 1
    return scale(position) / scale(counted)


ARCHITECTURE = Architecture(
    model_types=("llama4_text",),
    decoder="model",
    covers="the text decoders of Llama 4 Scout and Maverick",
    temperature=temperature,
)
