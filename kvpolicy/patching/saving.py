"""Models on disk that know their policy, and caches on disk.

Saving a model needs nothing here: a patched model's config carries its policy along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvpolicy.errors import CacheError, ModelError
from kvpolicy.language import Policy, loads_policy
from kvpolicy.patching.adapters import unwrapped
from kvpolicy.patching.caches import geometry_of, settings_for
from kvpolicy.patching.lengths import plan_for
from kvpolicy.patching.patch import FORMAT, apply, patch_of
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.saved import load_state, read_header, shape_of


def from_pretrained(
    path: str | Path,
    *,
    model_class: Any = AutoModelForCausalLM,
    compile: bool | str | None = None,
    backend: str = "auto",
    special_tokens: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model that was saved with a policy, and apply the policy to it.

    Args:
        path: a folder or hub id, as `model_class.from_pretrained` takes it.
        model_class: the transformers class to load with.
        compile, backend, special_tokens: as in `apply`.
        kwargs: passed on to `model_class.from_pretrained`.

    Raises:
        ModelError: the config names no policy, or one that this version cannot read.
    """
    model = model_class.from_pretrained(path, **kwargs)
    policy = recorded_policy(model.config, str(path))
    del model.config.kv_policy  # apply records it again, and remove() then leaves no trace of it
    return apply(model, policy, compile=compile, backend=backend, special_tokens=special_tokens)


def load_cache(model: Any, path: str | Path) -> PolicyCache:
    """A cache that `cache.save` wrote, on this model's device, ready to go on: pass it as `past_key_values`.

    The model must carry the policy that the cache was made under, with the same params, and have its shape and dtype;
    that it also has the same weights is the caller's to know.

    Raises:
        UsageError: the model carries no policy.
        CacheError: the file holds no cache, or one of another policy, model shape or dtype.
    """
    patch, header = patch_of(model), read_header(path)
    model = unwrapped(model)
    policy, geometry = patch.policy, geometry_of(model, patch)
    if header["digest"] != policy.digest:
        other = "other numbers" if header["policy"] == policy.name else f"policy {header['policy']}"
        raise CacheError(
            f"the cache in {path} was made under {other} (digest {header['digest']}), and this model carries "
            f"{policy.name} ({policy.digest}); apply that one to load it, or read the prompt again"
        )
    ours, theirs = shape_of(geometry), header["geometry"]
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if odd:
        said = ", ".join(f"{name} {theirs.get(name)} and not {ours.get(name)}" for name in odd)
        raise CacheError(f"the cache in {path} is of a model of another shape: {said}; read the prompt again")
    lengths = header["plan"]
    low, high = lengths["prompt"]
    plan = plan_for(policy, geometry, (low, high), lengths["max_new_tokens"], lengths["batch"], lengths["turns"])
    with torch.inference_mode(False):
        cache = PolicyCache(plan, **settings_for(model, patch))
        load_state(cache, path, header["counts"])
    return cache


def recorded_policy(config: Any, where: str) -> Policy:
    """The policy in a saved model's config.

    Raises:
        ModelError: there is none, or it is of a later format, or its text is not what was saved.
    """
    record = getattr(config, "kv_policy", None)
    if record is None:
        raise ModelError(f"{where} was saved without a policy; load it with transformers and call kvpolicy.apply")
    if record.get("format") != FORMAT:
        raise ModelError(
            f"{where} records its policy in format {record.get('format')}, and this kvpolicy reads {FORMAT}; upgrade it"
        )
    policy = loads_policy(record["yaml"], filename=f"{where}: config.kv_policy")
    if policy.digest != record["digest"]:
        raise ModelError(
            f"the policy in the config of {where} was edited by hand: its digest is {policy.digest}, recorded was "
            f"{record['digest']}; load the model with transformers and kvpolicy.apply the policy you want"
        )
    return policy
