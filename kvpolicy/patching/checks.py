"""Everything `apply` checks before its first change to a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpolicy.architecture import Architecture, architecture_of, architectures
from kvpolicy.errors import ModelError, UsageError
from kvpolicy.language import Policy
from kvpolicy.patching.hooks import LayerHook, ModelHook
from kvpolicy.plan import ModelGeometry, Plan, check_supported, make_plan


def check_model(model: Any, find: Callable[[Any], Architecture] | None = None) -> Architecture:
    """Whether this object can be patched at all; returns the architecture it is of.

    find: finds the architecture of a model whose type nobody has stated; without it, such a model is refused.

    Raises:
        UsageError: it is not a plain transformers model, or carries a policy already.
        ModelError: its architecture, its layers or where its weights lie are not supported.
    """
    if not isinstance(model, PreTrainedModel):
        wrapped = "; pass the model it wraps" if hasattr(model, "_orig_mod") else ""
        raise UsageError(f"kvpolicy.apply takes a transformers model, not a {type(model).__name__}{wrapped}")
    if any(_is_patched(module) for module in model.modules()):
        raise UsageError("this model carries a policy already; call kvpolicy.remove(model) first")
    unknown = model.config.model_type not in architectures()
    architecture = find(model) if unknown and find is not None else architecture_of(model.config.model_type)
    _check_devices(model)
    _check_layers(model, architecture)
    return architecture


def check_policy(policy: Policy, geometry: ModelGeometry) -> Plan:
    """Refuse a policy that cannot run on this shape; returns a plan for a one-token prompt, to leave lengths out of
    it."""
    plan = make_plan(policy, geometry, prompt=1, max_new_tokens=1024)
    check_supported(plan)
    return plan


def decoder_of(model: Any, architecture: Architecture) -> Any:
    """The text decoder of a model: the module that holds the decoder layers, with a config that gives their shape."""
    return model.base_model.get_submodule(architecture.decoder)


def decoder_layers(model: Any, architecture: Architecture) -> list[nn.Module]:
    """The decoder layers of a model, first to last."""
    return list(decoder_of(model, architecture).get_submodule(architecture.layers))


def layer_devices(model: Any, architecture: Architecture) -> list[torch.device]:
    """Where each decoder layer attends, first to last: `device_map` may have put them on several devices."""
    layers = decoder_layers(model, architecture)
    attending = (getattr(layer, architecture.attention, None) or layer for layer in layers)
    return [next((each.device for each in part.parameters()), model.device) for part in attending]


def is_rerouted(layers: list[nn.Module]) -> bool:
    """Whether a layer does not run what its class says, as where accelerate moves its inputs or weights."""
    return any("forward" in layer.__dict__ for layer in layers)


def check_forwards(layers: list[nn.Module]) -> None:
    """Refuse to compile layers that do not run what their class says."""
    if is_rerouted(layers):
        raise ModelError(
            "a decoder layer's forward was replaced on this model (accelerate does so when it moves weights), and a "
            "compiled layer would run without it; apply with compile=False"
        )


def _is_patched(module: nn.Module) -> bool:
    return any(isinstance(hook, ModelHook | LayerHook) for hook in module._forward_pre_hooks.values())


def _check_devices(model: PreTrainedModel) -> None:
    mapped = (getattr(model, "hf_device_map", None) or {}).values()  # offloaded weights may lie elsewhere for a while
    places = {str(parameter.device) for parameter in model.parameters()} | {"cpu", "disk"}.intersection(
        map(str, mapped)
    )
    if "meta" in places or "disk" in places or ("cpu" in places and len(places) > 1):
        raise ModelError(
            "parts of this model are offloaded to the CPU or the disk, and its cache would follow no layer there; load "
            "it on GPUs alone (device_map={'': 0} for one of them), in a smaller dtype or quantised if it does not fit"
        )


def _check_layers(model: Any, architecture: Architecture) -> None:
    name = type(model).__name__
    where = ".".join(filter(None, (architecture.decoder, architecture.layers)))
    try:
        config, layers = decoder_of(model, architecture).config, decoder_layers(model, architecture)
        said = config.num_hidden_layers
    except AttributeError:
        config, layers, said = model.config, [], "some"
    if len(layers) != said:
        raise ModelError(
            f"{name} says it has {said} decoder layers, and {len(layers)} were found at '{where}'; is it built by "
            "other code than transformers' own?"
        )
    states = ModelGeometry.from_config(config).states
    for layer in (layer for index, layer in enumerate(layers) if index not in states):
        attention = getattr(layer, architecture.attention, None)
        if not (attention is not None and _passes_keywords(layer) and _passes_keywords(attention)):
            raise ModelError(
                f"the decoder layers of {name} do not pass keywords on to '{architecture.attention}', as transformers' "
                "own do; load the model without trust_remote_code"
            )
    # Some families call it and leave the mark out; then transformers itself goes by their source.
    tells = getattr(model, "_can_set_attn_implementation", lambda: False)
    if not (model._supports_attention_backend or tells()):
        raise ModelError(f"{name} does not call its attention through transformers' attention interface")


def _passes_keywords(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
