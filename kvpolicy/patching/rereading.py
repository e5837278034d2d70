"""Models whose own code takes the cache away from `generate` and reads the text anew, which a policy's cache cannot.

Phi-3 does so at one length of the text, where its releases for long texts begin to turn keys by other frequencies. A
text that is longer from the start has those throughout; one that grows beyond it while it is generated is refused.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import MethodType
from typing import Any

from transformers import GenerationMixin

from kvpolicy.errors import UsageError
from kvpolicy.runtime import PolicyCache


def prepares_by_itself(model: Any) -> bool:
    """Whether the model's class chooses the inputs of each pass of `generate` itself."""
    own = getattr(type(model), "prepare_inputs_for_generation", None)
    return own is not None and own is not GenerationMixin.prepare_inputs_for_generation


def check_growth(model: Any, seen: int, columns: int, most: int) -> None:
    """Refuse a text that would outgrow the frequencies that its first keys were turned by.

    seen: columns that the cache has seen; columns: new ones of the prompt; most: all that the text may come to.

    Raises:
        UsageError: it would, and what to do.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope" or not prepares_by_itself(model):
        return
    limit = model.config.original_max_position_embeddings
    begun = seen or columns
    if begun <= limit < most:
        raise UsageError(
            f"beyond {limit} tokens {type(model).__name__} turns keys by other frequencies, and what a policy has kept "
            f"was turned by the first ones: a text that begins with {begun} tokens may come to {limit}, and this one "
            f"asks for {most}; ask for less, or begin with a prompt of more than {limit} tokens"
        )


@dataclass
class CacheKeeper:
    """Stands in for `prepare_inputs_for_generation` on one model instance whose class has its own.

    Where that takes a policy's cache away, the inputs are prepared as for other models.
    """

    model: Any

    @property
    def __signature__(self) -> inspect.Signature:  # generate looks at it to tell which arguments are known
        return inspect.signature(MethodType(type(self.model).prepare_inputs_for_generation, self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = kwargs.get("past_key_values")
        inputs: dict[str, Any] = type(self.model).prepare_inputs_for_generation(self.model, *args, **kwargs)
        if isinstance(given, PolicyCache) and inputs.get("past_key_values") is not given:
            inputs = GenerationMixin.prepare_inputs_for_generation(self.model, *args, **kwargs)
        return inputs
