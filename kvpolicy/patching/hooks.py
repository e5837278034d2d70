"""What `apply` hangs on a model: hooks that open each pass and hand each decoder layer its cache layer.

All are instances of module-level classes and hold no closure, so a patched model can be pickled and deep-copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.errors import CacheError, ModelError
from kvpolicy.patching.attention import newest_validity
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.moment import PROMPT


@dataclass(frozen=True)
class ModelHook:
    """Opens every pass over a policy's cache, before the text decoder runs.

    `implementation` is the attention that `apply` put into the config; `layers` how many decoder layers it governs.
    """

    implementation: str
    layers: int

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = by_name(model, args, kwargs)
        cache = given.get("past_key_values")
        if not isinstance(cache, PolicyCache) or (
            given.get("input_ids") is None and given.get("inputs_embeds") is None
        ):
            return None
        inputs = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        self._open(model, cache, inputs, given)
        return (), given

    @torch.compiler.disable(
        reason="kvpolicy opens each pass on the host; use kvpolicy.apply(model, policy, compile=True)"
    )
    def _open(self, model: Any, cache: PolicyCache, inputs: Tensor, given: dict[str, Any]) -> None:
        """Tell the cache what is coming, and leave nothing in the arguments that grows."""
        self._check(model, cache, inputs.shape[0], given)
        seen, columns = cache.get_seq_length(), inputs.shape[1]
        # What the model would count itself, had the pass not been opened yet.
        places = torch.arange(seen, seen + columns, device=inputs.device)[None]
        if not cache.opened_ahead:
            valid = newest_validity(given.get("attention_mask"), columns)
            if cache.rotation is not None:  # keys are turned from where they stand in their row
                places = cache.coming(columns, valid).to(inputs.device)
            cache.begin(columns, valid)
        if given.get("position_ids") is None:
            given["position_ids"] = places
        # The cache knows what is padding and what is causal. A 4-D mask passes through transformers untouched, so
        # neither the growing 2-D mask nor an N x N one is ever made; nothing reads this one.
        given["attention_mask"] = inputs.new_empty((1, 1, 1, 1), dtype=torch.bool)

    def _check(self, model: Any, cache: PolicyCache, rows: int, given: dict[str, Any]) -> None:
        implementation = model.config._attn_implementation
        if implementation != self.implementation:
            raise ModelError(
                f"the attention implementation was changed to '{implementation}' after kvpolicy.apply, which bypasses "
                "the policy; call kvpolicy.remove(model), set it, then apply again"
            )
        if len(cache.layers) != self.layers or cache.plan.batch != rows:
            raise CacheError(
                f"this cache was made for {cache.plan.batch} rows and {len(cache.layers)} layers, but the pass has "
                f"{rows} rows and the model {self.layers} layers; make one with kvpolicy.cache_for(model, batch={rows})"
            )
        if cache.moment.kind is not None and not cache.opened_ahead:
            raise CacheError(
                "a pass over this cache is open already: the last one failed halfway, and its layers disagree about "
                "what they have seen (call cache.reset() and start over), or cache.begin was called by hand (the model "
                "calls it)"
            )
        if given.get("output_attentions"):
            raise ModelError("no attention maps exist under a policy's cache; drop output_attentions=True")
        if model.training and getattr(model, "gradient_checkpointing", False):
            raise ModelError(
                "gradient checkpointing runs layers without a cache while the model trains; call model.eval(), or "
                "model.gradient_checkpointing_disable(), before a pass over a policy's cache"
            )
        stored, computed = cache.plan.geometry.dtype, str(model.dtype).removeprefix("torch.")
        if stored != computed:
            raise CacheError(
                f"this cache stores {stored}, and the model has been cast to {computed} since it was made; make a new "
                "one with kvpolicy.cache_for(model)"
            )


def close_pass(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After the decoder ran: a pass that nobody opens again fails from here on, instead of running on old clocks.

    Where rows end in padding, their last token's output stands in the columns of it (`Tail`).
    """
    cache = by_name(model, args, kwargs).get("past_key_values")
    return _close(cache, output) if isinstance(cache, PolicyCache) else None


@torch.compiler.disable
def _close(cache: PolicyCache, output: Any) -> Any:
    cache.finish()
    return cache.tail.close(output)


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a model, all by name."""
    names = list(inspect.signature(type(model).forward).parameters)[1:] if args else ()
    return {**dict(zip(names, args, strict=False)), **kwargs}


@dataclass(frozen=True)
class StateHook:
    """Tells a layer that keeps a state in place of tokens what of a pass is padding, and leaves it the cache.

    The mask that the model was given is ours, and says nothing.
    """

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, PolicyCache):
            return None
        moment, valid = cache.moment, None
        if moment.kind == PROMPT and not moment.whole and moment.position is not None:
            valid = moment.position >= 0
            if not bool(valid[:, -1].all()):
                raise CacheError(
                    f"{type(layer).__name__} carries a state from token to token, and a prompt that ends in padding "
                    "would change it; pad on the left (tokenizer.padding_side = 'left')"
                )
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        mask = None if valid is None or bool(valid.all()) else valid.to(hidden.device, torch.long)
        return args, {**kwargs, "attention_mask": mask}


@dataclass(frozen=True)
class LayerHook:
    """Hands a decoder layer its layer of a policy's cache, past transformers' own cache protocol.

    The attention then skips `Cache.update`, and `kv_layer` reaches the attention function through the keywords that
    every module on the way passes on. Nothing reads `layer_idx`, so layers of equal shape can share one graph.
    `temperature` is the architecture's.
    """

    index: int
    temperature: Callable[[Any, Any], Any] | None = None

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, PolicyCache):
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:
            if torch.is_grad_enabled():
                raise CacheError(
                    "a policy's cache is written in place and carries no gradients; run the model under torch.no_grad()"
                )
            # Checkpointed training makes embeddings ask for gradients where nothing records any: layers would differ.
            if args:
                args = (hidden.detach(), *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": hidden.detach()}
        handed = {"past_key_values": None, "kv_layer": cache.layers[self.index]}
        if self.temperature is not None:
            handed["kv_temperature"] = self.temperature
        return args, {**kwargs, **handed}
