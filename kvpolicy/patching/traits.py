"""Tell a policy's cache what a prompt's tokens are, special ones and images: read off the inputs of the model.

The hook stands before the base model, which sees ids where a text decoder below it may see embeddings alone. It is
there only where the policy asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.architecture import Architecture
from kvpolicy.errors import CacheError, UsageError
from kvpolicy.language import Policy
from kvpolicy.patching.hooks import by_name
from kvpolicy.runtime import PolicyCache

NAMED = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")
"""What configs call special tokens."""


@dataclass(frozen=True)
class TraitHook:
    """Tells a cache, before a prompt pass, which tokens are special and which are an image's.

    ``special`` are ids; ``image`` is the id that stands for an image's token, None where the model sees no images.
    """

    policy: str
    special: tuple[int, ...]
    image: int | None

    @classmethod
    def of(cls, model: Any, architecture: Architecture, policy: Policy, special_tokens: Any) -> TraitHook:
        """For a model; ``special_tokens`` as ``kvpolicy.apply`` takes them."""
        ids = _named(model) if special_tokens is None else getattr(special_tokens, "all_special_ids", special_tokens)
        try:
            special = tuple(sorted({int(each) for each in ids}))
        except (TypeError, ValueError):
            raise UsageError(
                f"special_tokens are ids, or a tokenizer that knows them, not a {type(special_tokens).__name__}"
            ) from None
        image = getattr(model.base_model.config, architecture.image_token) if architecture.image_token else None
        return cls(policy.name, special, image)

    def check_special(self) -> None:
        """Refuse a policy that asks for special tokens where none are known."""
        if not self.special:
            raise UsageError(
                f"{self.policy} asks which tokens of a prompt are special, and this model's configs name none; say so: "
                "kvpolicy.apply(model, policy, special_tokens=tokenizer), or a list of ids"
            )

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = by_name(model, args, kwargs)
        cache = given.get("past_key_values")
        if isinstance(cache, PolicyCache) and not cache.opened_ahead and cache.wants:
            self._tell(cache, given)

    @torch.compiler.disable
    def _tell(self, cache: PolicyCache, given: dict[str, Any]) -> None:
        ids: Tensor | None = given.get("input_ids")
        inputs = given.get("inputs_embeds") if ids is None else ids
        if inputs is None or cache.kind_of(inputs.shape[1]) != "prompt":
            return
        wants, kinds = cache.wants, given.get("mm_token_type_ids")
        if "special" in wants:
            if ids is None:
                raise self._blind("special tokens", "special")
            cache.tell(special=torch.isin(ids, torch.tensor(self.special, device=ids.device)))
        if "image" in wants and self.image is not None:
            if kinds is not None:
                cache.tell(modality=kinds[:, -inputs.shape[1] :])
            elif ids is not None:
                cache.tell(modality=ids == self.image)
            else:
                raise self._blind("images", "modality")

    def _blind(self, what: str, name: str) -> CacheError:
        also = ", mm_token_type_ids" if name == "modality" else ""
        return CacheError(
            f"{self.policy} treats {what} apart, and embeddings do not show which they are; pass input_ids{also}, or "
            f"call cache.tell({name}=…) before the pass"
        )


def _named(model: Any) -> Iterator[int]:
    """Ids that a model's configs call special."""
    configs = (getattr(model, "generation_config", None), model.config, model.config.get_text_config())
    for config in configs:
        for name in NAMED:
            value = getattr(config, name, None)
            yield from value if isinstance(value, list | tuple) else () if value is None else (value,)
