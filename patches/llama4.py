"""Llama 4: chunked layers with rotation, full layers without, experts. Text alone."""

from typing import Any

import torch
from torch import Tensor

from kvpolicy.architecture import Architecture


def temperature(attention: Any, position: Tensor) -> Tensor | None:
    """What layers without rotation multiply their queries by, so that long texts do not flatten their attention.

    The model's own code counts positions from the length of a cache that it is not handed here, so from 0 in each pass.
    """
    if attention.use_rope or not attention.attn_temperature_tuning:
        return None

    def scale(places: Tensor) -> Tensor:
        steps = torch.floor((places.clamp(min=0).float() + 1.0) / attention.floor_scale)
        return torch.log1p(steps) * attention.attn_scale + 1.0

    return scale(position) / scale(torch.arange(position.shape[1], device=position.device))


ARCHITECTURE = Architecture(
    model_types=("llama4_text",),
    decoder="model",
    covers="the text decoders of Llama 4 Scout and Maverick",
    temperature=temperature,
)
