"""Models whose images' tokens attend to one another in both directions: under a policy they take text alone.

The base model of such a family makes masks before its text decoder runs, from what it knows of images. The hook stands
before it, refuses prompts with images, and hands the padding mask on as the text decoder takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.errors import CacheError
from kvpolicy.patching.hooks import by_name
from kvpolicy.plan.layer_kinds import FULL, SLIDING
from kvpolicy.runtime import PolicyCache


@dataclass(frozen=True)
class TextAlone:
    """``image`` is the id that stands for an image's token."""

    image: int | None

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = by_name(model, args, kwargs)
        if not isinstance(given.get("past_key_values"), PolicyCache):
            return None
        self._check(type(model).__name__, given)
        given["attention_mask"] = dict.fromkeys((FULL, SLIDING), given.get("attention_mask"))
        given.pop("token_type_ids", None)
        return (), given

    @torch.compiler.disable
    def _check(self, name: str, given: dict[str, Any]) -> None:
        ids, kinds = given.get("input_ids"), given.get("token_type_ids")
        shown = given.get("pixel_values") is not None or bool(given.get("mm_encoder_outputs"))
        for inputs, image in ((ids, self.image), (kinds, 1)):  # of a generated pass nothing is asked: no wait for it
            if isinstance(inputs, Tensor) and inputs.shape[-1] > 1 and image is not None:
                shown = shown or bool((inputs == image).any())
        if shown:
            raise CacheError(
                f"tokens of an image see one another in both directions in {name}, and under a policy every token sees "
                "what was before it; leave the images out, or call kvpolicy.remove(model) first"
            )
