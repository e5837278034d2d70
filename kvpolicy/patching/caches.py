"""The cache a patched model runs on: planned from the lengths of a prompt, built for `generate` or by hand."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from kvpolicy.errors import CacheError, PolicyError, UsageError
from kvpolicy.patching.adapters import virtual_tokens
from kvpolicy.patching.checks import decoder_of, layer_devices
from kvpolicy.patching.lengths import Lengths, bucket, plan_for, shared_plan
from kvpolicy.patching.rereading import check_growth
from kvpolicy.patching.rotary import rotation_of
from kvpolicy.plan import ModelGeometry
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.tail import newest_token

if TYPE_CHECKING:
    from kvpolicy.patching.patch import Patch


def build_cache(
    model: Any, patch: Patch, *, prompt: Lengths, max_new_tokens: int, batch: int, turns: int = 1
) -> PolicyCache:
    """A fresh cache for a patched model, the caller's own; lengths as in `make_plan`."""
    plan = plan_for(patch.policy, geometry_of(model, patch), prompt, max_new_tokens, batch, turns)
    with torch.inference_mode(False):  # made inside inference mode, its tensors could never be written outside again
        return PolicyCache(plan, **settings_for(model, patch))


def geometry_of(model: Any, patch: Patch) -> ModelGeometry:
    """The shape of a patched model, which may have been cast since the policy was applied."""
    return replace(patch.geometry, dtype=str(model.dtype).removeprefix("torch."))


def settings_for(model: Any, patch: Patch) -> dict[str, Any]:
    """What a cache for this model is made with, beside its plan."""
    devices = layer_devices(model, patch.architecture)
    settings = {"device": devices, "dtype": model.dtype, "backend": patch.backend, "ranks": patch.ranks}
    if patch.policy.positions == "compact":
        decoder = decoder_of(model, patch.architecture)
        settings["rotation"] = rotation_of(model, decoder, patch.architecture)
    return settings


@dataclass
class CacheBuilder:
    """Stands in for `_prepare_cache_for_generation` on one model instance.

    A callable object and not a bound function: pickle would restore a bound method as the class's own.
    """

    model: Any
    patch: Patch

    def __call__(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put a policy's cache where `generate` looks for one; where the caller chose another, do what the class does.

        A policy's cache that is handed in again gets room for the turn to come.
        """
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, PolicyCache):
            chosen = cache is not None or generation_config.cache_implementation is not None
            if chosen or generation_config.use_cache is False:
                self._defer(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
                return
        _refuse(generation_config, generation_mode)
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        turn = Turn.read(generation_config, model_kwargs, max_cache_length, cache, rows)
        seen = 0 if cache is None else cache.get_seq_length()
        before = 0 if cache is None else cache.clocks.host_t
        check_growth(self.model, seen, turn.columns, seen + turn.columns + turn.max_new_tokens - before)
        if cache is None or not cache.get_seq_length():
            turn = turn.after(virtual_tokens(self.model))
        place_padding(model_kwargs)
        if cache is None:
            model_kwargs["past_key_values"] = self._lend(turn, rows)
        else:
            self._defer(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            cache._is_user_defined = True  # so do recent versions of transformers; decoding loops ask for it
            turn.make_room(cache, self.patch)
        turn.announce(model_kwargs["past_key_values"])

    def _lend(self, turn: Turn, rows: int) -> PolicyCache:
        """An empty cache for one call; the one of the last call, where a decode loop gave it back and it is alike."""
        patch, geometry = self.patch, geometry_of(self.model, self.patch)
        prompt, new = patch.room.widen(turn.prompt, turn.max_new_tokens)
        if prompt is None and patch.compiler is not None:
            plan = shared_plan(patch.policy, geometry, turn.prompt, new, rows)
        else:
            plan = plan_for(patch.policy, geometry, prompt or turn.prompt, new, rows)
        with torch.inference_mode(False):
            return patch.shelf.lend(self.model, plan, settings_for(self.model, patch))

    def _defer(self, *arguments: Any) -> None:
        type(self.model)._prepare_cache_for_generation(self.model, *arguments)


@dataclass(frozen=True)
class NoPagedCache:
    """Stands in for `init_continuous_batching` on one model instance, which would leave the policy out without a word:
    it switches the attention implementation and brings a paged cache of its own."""

    policy: str

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise UsageError(
            f"continuous batching (generate_batch) runs on a paged cache that knows nothing of {self.policy}; call "
            "generate with a padded batch, or kvpolicy.remove(model) first"
        )


def _refuse(generation_config: GenerationConfig, generation_mode: GenerationMode) -> None:
    if generation_config.use_cache is False:
        raise UsageError("use_cache=False together with a policy's cache: drop one of the two")
    if generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant:
        raise UsageError(
            "assisted decoding (an assistant model or prompt_lookup_num_tokens) takes tokens back, and a policy may "
            "have evicted what they displaced; generate without it, or kvpolicy.remove(model) first"
        )


def place_padding(model_kwargs: dict[str, Any]) -> None:
    """Where rows end in padding, let it stand where their last token does: `generate` counts positions on from there,
    and the generated tokens come next in their rows."""
    mask, places = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is None or places is None or bool(mask[:, -1].all()):
        return
    newest = newest_token(mask[:, -places.shape[-1] :].bool()).clamp(min=0).to(places.device)
    model_kwargs["position_ids"] = places.gather(-1, newest.expand(places.shape))


@dataclass(frozen=True)
class Turn:
    """What one call of `generate` brings, as totals over the cache's life but for `columns`, which are new.

    `prompt` is the (fewest, most) prompt tokens of a row, padding left out; `max_new_tokens` the generated ones.
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
        cache: PolicyCache | None,
        rows: int,
    ) -> Turn:
        """Read it from what `generate` has prepared.

        Raises:
            CacheError: the cache is for another number of rows, or has seen as many columns as the input covers.
        """
        mask: Tensor | None = model_kwargs.get("attention_mask")
        if mask is not None:
            covered = mask.shape[1]
        else:  # generate drops a mask of ones, and notes how long it was
            covered = getattr(generation_config, "_mask_length", None) or model_kwargs["position_ids"].shape[-1]
        before, seen, generated = [0] * rows, 0, 0
        if cache is not None:
            seen, generated = cache.get_seq_length(), cache.clocks.host_t
            if cache.plan.batch != rows:
                raise CacheError(f"this cache was made for {cache.plan.batch} rows, and generate runs {rows} of them")
            before = cache.clocks.prompt_len.tolist()
        if not covered:
            raise UsageError(
                "the prompt is empty: give at least one token, or leave the ids out, for generate to begin with the "
                "model's bos_token_id"
            )
        if covered <= seen:
            raise CacheError(
                f"the cache has already seen {seen} columns, and the input, with its attention mask, covers {covered}: "
                "pass the whole conversation, or the new ids with an attention mask over all of it"
            )
        columns = covered - seen
        new = [columns] * rows if mask is None else mask[:, seen:].sum(-1).tolist()
        lengths = [int(old + more) for old, more in zip(before, new, strict=True)]
        # max_length counts the ids that were passed: in a later turn all of them, or the new ones only.
        limit = generation_config.max_new_tokens
        limit = max_cache_length + 1 - columns if limit is None else limit
        return cls(columns, (min(lengths), max(lengths)), generated + limit)

    def after(self, tokens: int) -> Turn:
        """The same behind so many tokens that an adapter puts before every row."""
        low, high = self.prompt
        return replace(self, columns=self.columns + tokens, prompt=(low + tokens, high + tokens))

    def make_room(self, cache: PolicyCache, patch: Patch) -> None:
        """Extend a cache whose plan does not hold this turn as well."""
        plan = cache.plan
        fits = plan.prompt[0] <= self.prompt[0] and self.prompt[1] <= plan.prompt[1]
        if fits and self.max_new_tokens <= plan.max_new_tokens and cache.passes["prompt"] < plan.turns:
            return
        with torch.inference_mode(False):
            if patch.compiler is not None:
                with suppress(UsageError, PolicyError):  # no room for the longest of the bucket: then for these
                    cache.extend(prompt=bucket(self.prompt), max_new_tokens=self.max_new_tokens)
                    return
            cache.extend(prompt=self.prompt, max_new_tokens=self.max_new_tokens)

    def announce(self, cache: PolicyCache) -> None:
        """Tell the cache the turn's length, as its chunks cannot; a single token on top goes on where it stopped."""
        if self.columns > 1 or not cache.get_seq_length():
            cache.expect_prompt(self.columns)
