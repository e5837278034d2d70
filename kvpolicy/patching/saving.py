"""Models on disk that know their policy. Saving needs nothing here: a patched model's config carries it along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from kvpolicy.errors import ModelError
from kvpolicy.language import Policy, loads_policy
from kvpolicy.patching.patch import FORMAT, apply


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
