"""Rotary positions, turned: a vector that a model rotated at one position, as if it had stood at another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """How a model rotates queries and keys: channel i and channel R / 2 + i, of the first R, are a pair, and at
    position p it is turned by p * frequencies[i] (RoFormer, arXiv:2104.09864, laid out in halves). Scaled or not: a
    turn keeps lengths.
    """

    frequencies: tuple[float, ...]

    @classmethod
    def none(cls) -> Rotation:
        """That of vectors which carry no position: synthetic ones."""
        return cls(())


def turn(vectors: Tensor, start: Tensor, to: Tensor, frequencies: Tensor) -> Tensor:
    """Vectors [..., D] rotated at the positions ``start``, as if at ``to``; both [...] or broadcast to it.

    ``frequencies`` [R / 2] float32. Angles are the products in float32 that the model itself had: at 100,000 they are
    off by up to 0.004 rad, and so is the model. As both ends are exactly its own, the turn undoes just what the model
    did: cosine and sine of the difference come from those of both ends, each within 2e-7, however large the positions.
    """
    half = frequencies.shape[0]
    if half == 0:
        return vectors
    wide = torch.promote_types(vectors.dtype, torch.float32)
    here, there = ((at[..., None].float() * frequencies).to(wide) for at in (start, to))
    cos = here.cos() * there.cos() + here.sin() * there.sin()
    sin = here.cos() * there.sin() - here.sin() * there.cos()
    first, second = vectors[..., :half].to(wide), vectors[..., half : 2 * half].to(wide)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(vectors.dtype)
    return turned if 2 * half == vectors.shape[-1] else torch.cat([turned, vectors[..., 2 * half :]], dim=-1)
