"""The cache a patched model runs on: planned from the lengths of a prompt, built for `generate` or by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from kvpolicy.errors import CacheError, UsageError
from kvpolicy.plan import make_plan
from kvpolicy.runtime import PolicyCache

if TYPE_CHECKING:
    from kvpolicy.patching.patch import Patch


def build_cache(
    model: PreTrainedModel,
    patch: Patch,
    *,
    prompt: int | tuple[int, int],
    max_new_tokens: int,
    batch: int,
    turns: int = 1,
) -> PolicyCache:
    """A fresh cache for a patched model; lengths as in `make_plan`."""
    plan = make_plan(
        patch.policy, patch.geometry, batch=batch, prompt=prompt, max_new_tokens=max_new_tokens, turns=turns
    )
    with torch.inference_mode(False):  # made inside inference mode, its tensors could never be written outside again
        return PolicyCache(plan, device=model.device, dtype=model.dtype)


@dataclass
class CacheBuilder:
    """Stands in for `_prepare_cache_for_generation` on one model instance.

    A callable object and not a bound function: pickle would restore a bound method as the class's own.
    """

    model: PreTrainedModel
    patch: Patch

    def __call__(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put a policy's cache where `generate` looks for one; do what the class does where the caller chose."""
        cache = model_kwargs.get("past_key_values")
        chosen = cache is not None or generation_config.cache_implementation is not None
        if not isinstance(cache, PolicyCache) and (chosen or generation_config.use_cache is False):
            self._defer(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            return
        _refuse(generation_config, generation_mode)
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        turn = _Turn.read(generation_config, model_kwargs, max_cache_length, rows, cache)
        if cache is None:
            cache = build_cache(
                self.model, self.patch, prompt=turn.prompt, max_new_tokens=turn.max_new_tokens, batch=rows
            )
            model_kwargs["past_key_values"] = cache
        else:
            self._defer(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            cache.extend(prompt=turn.prompt, max_new_tokens=turn.max_new_tokens)
        cache.expect_prompt(turn.columns)

    def _defer(self, *arguments: Any) -> None:
        type(self.model)._prepare_cache_for_generation(self.model, *arguments)


def _refuse(generation_config: GenerationConfig, generation_mode: GenerationMode) -> None:
    if generation_config.use_cache is False:
        raise UsageError("use_cache=False together with a policy's cache: drop one of the two")
    if generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant:
        raise UsageError(
            "assisted decoding (an assistant model or prompt_lookup_num_tokens) takes tokens back, and a policy may "
            "have evicted what they displaced; generate without it, or kvpolicy.remove(model) first"
        )


@dataclass(frozen=True)
class _Turn:
    """What one call of `generate` brings: new columns, and the lengths to plan for, this turn's alone.

    `prompt` is (fewest, most) tokens of a row, padding left out.
    """

    columns: int
    prompt: tuple[int, int]
    max_new_tokens: int

    @classmethod
    def read(
        cls,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        max_cache_length: int,
        rows: int,
        cache: PolicyCache | None,
    ) -> _Turn:
        mask: Tensor | None = model_kwargs.get("attention_mask")
        if mask is not None:
            total = mask.shape[1]
        else:  # generate drops a mask of ones, and notes how long it was
            total = getattr(generation_config, "_mask_length", None) or model_kwargs["position_ids"].shape[-1]
        seen = 0 if cache is None else cache.get_seq_length()
        if cache is not None and cache.plan.batch != rows:
            raise CacheError(f"this cache was made for {cache.plan.batch} rows, and generate runs {rows} of them")
        if total <= seen:
            raise CacheError(
                f"the cache has already seen {seen} columns, and the input, with its attention mask, covers {total}: "
                "pass the whole conversation, or the new ids with an attention mask over all of it"
            )
        columns = total - seen
        lengths = [columns] if mask is None else mask[:, seen:].sum(-1).tolist()
        new = generation_config.max_new_tokens
        if new is None:  # max_length counts the ids that were passed: in a later turn all, or only the new ones
            new = max_cache_length + 1 - columns
        return cls(columns, (int(min(lengths)), int(max(lengths))), new)
