"""Models inside peft's wrappers. peft need not be installed: it is known by what its objects have."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from kvpolicy.errors import ModelError

LAID_INTO_CACHES = ("PREFIX_TUNING", "CARTRIDGE")
"""peft's methods that put learned keys and values into a cache of their own."""


def unwrapped(model: Any) -> Any:
    """The transformers model that an adapter's wrapper holds and runs; any other object as it is."""
    inner = None if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def check_adapters(model: Any) -> None:
    """Refuse a wrapper whose adapter a policy's cache cannot serve.

    Raises:
        ModelError: its active adapter brings keys and values that no pass of the model has made.
    """
    config = None if isinstance(model, PreTrainedModel) else getattr(model, "active_peft_config", None)
    kind = getattr(getattr(config, "peft_type", None), "value", "")
    if kind in LAID_INTO_CACHES:
        raise ModelError(
            f"this adapter ({kind.lower().replace('_', ' ')}) replaces the cache with one that already holds keys and "
            "values of its own, and no policy has admitted them; use an adapter of the weights (LoRA) or prompt tuning"
        )


def virtual_tokens(model: Any) -> int:
    """Learned tokens that a wrapper puts before every prompt while its `generate` runs this model; 0 without one.

    Raises:
        ModelError: as `check_adapters`.
    """
    wrapper = getattr(model.prepare_inputs_for_generation, "__self__", model)  # peft's own, for the length of a call
    if wrapper is model:
        return 0
    check_adapters(wrapper)
    config = getattr(wrapper, "active_peft_config", None)
    return int(config.num_virtual_tokens) if getattr(config, "is_prompt_learning", False) else 0
