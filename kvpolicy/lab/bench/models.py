"""Models to time: a published shape with random weights, and copies of a model on the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvpolicy.errors import ModelError, UsageError
from kvpolicy.models.shapes import config_named


def random_model(
    name: str, *, layers: int | None = None, dtype: str | None = None, device: torch.device, seed: int = 0
) -> Any:
    """A published shape with random weights: what a step costs does not depend on what the weights say.

    Args:
        layers: decoder layers, where fewer than the model has.

    Raises:
        ModelError: there is no such shape, or transformers does not know its kind of model.
        UsageError: more layers than there are.
    """
    fields = config_named(name)
    if layers is not None and not 1 <= layers <= fields["num_hidden_layers"]:
        raise UsageError(f"--layers {layers}: {name} has 1..{fields['num_hidden_layers']} layers")
    stored = dtype or str(fields["dtype"])
    given = {key: value for key, value in fields.items() if key not in ("model_type", "dtype", "transformers_version")}
    try:
        config = AutoConfig.for_model(
            fields["model_type"], **given | {"num_hidden_layers": layers or fields["num_hidden_layers"]}
        )
    except ValueError:
        raise ModelError(f"this transformers has no models of type {fields['model_type']}; update it") from None
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, stored))
    return model.to(device).eval()


def twin(model: Any) -> Any:
    """Another model object on the same weights, to be patched on its own."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def shallow(model: Any, layers: int) -> Any:
    """A twin with its first decoder layers only."""
    result = twin(model)
    base = result.base_model
    base.layers = base.layers[:layers]
    for config in {id(config): config for config in (result.config, base.config)}.values():
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        config.num_hidden_layers = layers
    return result


def random_tokens(model: Any, rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator).to(model.device)
