"""How a model rotates queries and keys, read off the model; for policies with ``positions: compact``."""

from __future__ import annotations

import sys
from typing import Any

import torch

from kvpolicy.architecture import Architecture
from kvpolicy.attention import Rotation, turn
from kvpolicy.errors import ModelError

CHANGING = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies depend on how long the text is by now."""

PLACES = (0, 1, 5, 100, 1000)
"""Positions at which a turn is held against what the model does itself."""

WAY_OUT = "choose a policy with absolute positions"


def rotation_of(model: Any, decoder: Any, architecture: Architecture) -> Rotation:
    """The rotation of a model: one for all layers, the same at every length.

    Raises:
        ModelError: it has none of this kind, and why.
    """
    name = type(model).__name__
    module = getattr(decoder, architecture.rotary, None)
    frequencies = getattr(module, "inv_freq", None)
    if module is None or not isinstance(frequencies, torch.Tensor) or frequencies.dim() != 1:
        raise ModelError(
            f"compact positions turn keys by one list of rotary frequencies, and {name} keeps none at "
            f"'{architecture.rotary}.inv_freq'; {WAY_OUT}"
        )
    kind = str(getattr(module, "rope_type", "default"))
    if any(word in kind for word in CHANGING):
        raise ModelError(
            f"compact positions turn keys by fixed rotary frequencies, and those of this {name} change with the length "
            f"of the text (rope type {kind}); {WAY_OUT}"
        )
    if len(set(getattr(decoder.config, "no_rope_layers", None) or ())) > 1:
        raise ModelError(f"compact positions need all layers to rotate alike, and some of {name} do not; {WAY_OUT}")
    return Rotation(tuple(frequencies.detach().float().tolist()))


def _has_axes(config: Any) -> bool:
    """Whether tokens stand in time, height and width: a text's places are the same in all three."""
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})


def check_rotation(model: Any, decoder: Any, architecture: Architecture, attention: Any) -> None:
    """Turn vectors that the model's own code has rotated, and see that they lie where the model would have put them.

    Raises:
        ModelError: they do not, so the model rotates otherwise than in halves, or not at all.
    """
    rotation, module = rotation_of(model, decoder, architecture), getattr(decoder, architecture.rotary)
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    places = torch.tensor([PLACES], device=model.device)
    size = int(getattr(attention, "head_dim", 2 * len(rotation.frequencies)))
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 1, 1, size, generator=generator).expand(-1, -1, len(PLACES), -1).to(model.device)
    try:
        cos, sin = module(vectors, places.expand(3, -1, -1) if _has_axes(decoder.config) else places)
        (rotated, _) = rotate(vectors, vectors, cos, sin)  # type: ignore[misc]
        frequencies = torch.tensor(rotation.frequencies, device=model.device)
        start, to = places[:, None, :, None], places[:, None, None, :]
        turned = turn(rotated[..., None, :].expand(-1, -1, -1, len(PLACES), -1), start, to, frequencies)
        same = torch.allclose(turned, rotated[:, :, None].expand_as(turned), rtol=1e-3, atol=1e-3)
    except Exception:  # whatever its own code does not take means that it is not of this kind
        same = False
    if not same:
        raise ModelError(
            "compact positions turn keys as Llama rotates them, in halves of the first channels, and "
            f"{type(model).__name__} does it otherwise; {WAY_OUT}"
        )
