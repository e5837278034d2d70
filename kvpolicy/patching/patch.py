"""Apply a policy to a model, and take it off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from kvpolicy.architecture import Architecture, architectures
from kvpolicy.attention.backends import choose_backend
from kvpolicy.errors import ModelError, UntestedWarning, UsageError
from kvpolicy.language import Policy, load_policy
from kvpolicy.patching.adapters import check_adapters, unwrapped
from kvpolicy.patching.ahead import BACKGROUND, BackgroundCompiler
from kvpolicy.patching.attention import PREFIX, register
from kvpolicy.patching.caches import CacheBuilder, NoPagedCache, build_cache
from kvpolicy.patching.changes import Journal
from kvpolicy.patching.checks import (
    check_forwards,
    check_model,
    check_policy,
    decoder_layers,
    decoder_of,
    is_rerouted,
    layer_devices,
)
from kvpolicy.patching.generic import PROMPT, STEPS, find_architecture, try_alone
from kvpolicy.patching.hooks import LayerHook, ModelHook, StateHook, close_pass
from kvpolicy.patching.lengths import Room
from kvpolicy.patching.parallel import ranks_of
from kvpolicy.patching.rereading import CacheKeeper, prepares_by_itself
from kvpolicy.patching.rotary import check_rotation
from kvpolicy.patching.text_alone import TextAlone
from kvpolicy.patching.traits import TraitHook
from kvpolicy.plan import ModelGeometry
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.compiling import CompiledForward, CompileReport, StepCompiler
from kvpolicy.runtime.ranks import ALONE, Ranks
from kvpolicy.runtime.shelf import Shelf
from kvpolicy.versions import warn_untested

ATTRIBUTE = "_kvpolicy"
FORMAT = 1  # of config.kv_policy

Model = TypeVar("Model", bound=Any)


@dataclass
class Patch:
    """What `apply` did to one model; it lives on the model, as its only new attribute with a name of ours.

    `architecture` is what is known of the model, or was found. `compiler` is None where steps run eagerly. `room` is
    what was said of the lengths to come. `ranks` share the model's heads. `shelf` keeps one cache between two calls of
    `generate`.
    """

    policy: Policy
    geometry: ModelGeometry
    previous: str
    compiler: StepCompiler | None
    journal: Journal
    backend: str = "auto"
    room: Room = field(default_factory=Room)
    architecture: Architecture = field(default_factory=lambda: Architecture((), ""))
    ranks: Ranks = ALONE
    shelf: Shelf = field(default_factory=Shelf)

    def take_off(self) -> None:
        """Undo every change, and free the cache that is kept for a next call."""
        self.journal.undo()
        self.shelf.clear()
        if self.compiler is not None:
            self.compiler.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register(self.previous)  # a model may be unpickled in a process where nothing was applied yet


def apply(
    model: Model,
    policy: str | Path | Policy,
    *,
    compile: bool | str | None = None,
    backend: str = "auto",
    max_prompt: int | None = None,
    max_new_tokens: int | None = None,
    special_tokens: Any = None,
    generic: bool = False,
    **params: object,
) -> Model:
    """Put a policy under the attention of a model; from then on `generate` builds the policy's cache by itself.

    Only this instance changes: not its class, not another model, not its weights. With any other cache it behaves as
    before. `remove` undoes it; `save_pretrained` records the policy in the config.

    Args:
        model: a transformers model, or peft's wrapper of one: then the model inside it is patched, and all adapters run
            under the policy.
        policy: the name of a shipped policy, the path of a YAML file, or a loaded Policy.
        compile: run generated steps through torch.compile, one graph per kind of step and layer shape; a string names
            the backend of torch.compile (inductor by default), or is "background": another process compiles while
            tokens come eagerly, and steps are taken over when they are done; None: on CUDA only, and not where
            `device_map` spreads the model, whose layers then run through accelerate.
        backend: who computes attention in generated steps: "torch", "triton", or "auto", which is triton on a GPU
            where it can run.
        max_prompt, max_new_tokens: the most tokens of a row that any call of `generate` will bring. Caches are then
            planned once for that, so that all calls share one allocation and what is compiled and captured for it; a
            call that brings more is refused. By default every call is planned for its own lengths.
        special_tokens: which ids are special, for a policy that asks: a list of them, or a tokenizer, whose special
            ones are meant. By default those that the model's configs name: where text begins and ends, and padding.
        generic: patch a model of a family that kvpolicy does not know, if it is built as transformers' decoders are:
            it is tried on a few tokens, and a warning says that nobody tested it. Steps then run eagerly by default.
        params: values for the policy's params, as `--set` gives them.

    Returns:
        The same object.

    Raises:
        UsageError, ModelError, PolicyError: it cannot be done, and why; the model is then as it was.
    """
    check_adapters(model)
    given, model = model, unwrapped(model)
    architecture = check_model(model, find_architecture if generic else None)
    untested = model.config.model_type not in architectures()
    decoder = decoder_of(model, architecture)
    policy = _resolve(policy, params)
    dtype = str(model.dtype).removeprefix("torch.")
    geometry = replace(ModelGeometry.from_config(model.base_model.config, dtype), sinks=architecture.sinks)
    asked = check_policy(policy, geometry).traits
    traits = TraitHook.of(model, architecture, policy, special_tokens) if asked else None
    if traits is not None and "special" in asked:
        traits.check_special()
    ranks = ranks_of(model, architecture, geometry)
    if ranks.size > 1 and geometry.states:
        raise ModelError(
            f"{type(model).__name__} has layers that keep a state in place of tokens, and how those are shared out by "
            "tensor parallelism is untested; load it without tp_plan"
        )
    choose_backend(backend, model.device, geometry, len(set(layer_devices(model, architecture))))
    room = Room(max_prompt, max_new_tokens)
    room.check(policy, geometry)
    layers = decoder_layers(model, architecture)
    if compile is None:
        wanted: bool | str = model.device.type == "cuda" and not untested and not is_rerouted(layers)
    else:
        wanted = compile
    if policy.positions == "compact":
        check_rotation(model, decoder, architecture, getattr(layers[geometry.governed[0]], architecture.attention))
    if wanted:
        check_forwards(layers)
    if wanted == BACKGROUND and ranks.size > 1:
        raise UsageError(
            f"compile={BACKGROUND!r} compiles in a process that is none of the {ranks.size} ranks; compile=True does "
            "it in each of them"
        )
    compiler = _compiler(wanted)
    previous = (decoder.config._attn_implementation or "eager").removeprefix(PREFIX)
    patch = Patch(policy, geometry, previous, compiler, Journal(), backend, room, architecture, ranks)
    warn_untested()
    if untested:
        _try(model, patch)
    try:
        _change(model, patch, layers, traits)
        return given  # in here, so that an interrupt that comes right now finds all or nothing
    except BaseException:
        patch.journal.undo()
        raise


def _try(model: Any, patch: Patch) -> None:
    """See whether a model of an unknown family is what it seems to be: alone, and with all of a few tokens kept."""
    trial = try_alone(model, patch.architecture, patch.geometry)
    if patch.compiler is not None and not trial.plain_layers:
        raise ModelError(
            f"the decoder layers of {type(model).__name__} ask for more than the hidden states and their rotation, and "
            "a compiled step gives them no more; apply with compile=False"
        )
    dense = replace(patch, policy=load_policy("dense"), compiler=None, journal=Journal(), room=Room(), shelf=Shelf())
    try:
        _change(model, dense, decoder_layers(model, patch.architecture), None)
        trial.hold(model, build_cache(model, dense, prompt=PROMPT, max_new_tokens=STEPS, batch=1))
    finally:
        dense.take_off()
    warnings.warn(
        f"kvpolicy does not know models of type '{model.config.model_type}' and never tested one: it found its layers "
        f"by structure, and over {PROMPT + STEPS} tokens, all kept, it gave the unpatched model's logits",
        UntestedWarning,
        stacklevel=3,
    )


def remove(model: Any) -> None:
    """Take a policy off a model: every change is undone, and the model is what it was, object for object.

    Raises:
        UsageError: the model carries no policy.
    """
    patch_of(model).take_off()


@contextmanager
def applied(model: Model, policy: str | Path | Policy, **arguments: Any) -> Iterator[Model]:
    """`apply`, with its arguments, for the length of a `with` block; the policy comes off also when it raises."""
    apply(model, policy, **arguments)
    patch = patch_of(model)
    try:
        yield model
    finally:
        patch.take_off()


def cache_for(
    model: Any, *, prompt: int | tuple[int, int], max_new_tokens: int, batch: int = 1, turns: int = 1
) -> PolicyCache:
    """A fresh cache to pass as `past_key_values` where the model is called without `generate`.

    Args:
        prompt: as in `kvpolicy.make_plan`: prompt tokens of a row, or (fewest when its first turn ends, most in all).
        max_new_tokens: generated tokens of a row, over all turns.
        batch: rows.
        turns: prompt turns the cache will see.
    """
    patch = patch_of(model)
    return build_cache(unwrapped(model), patch, prompt=prompt, max_new_tokens=max_new_tokens, batch=batch, turns=turns)


def compile_report(model: Any) -> CompileReport:
    """What torch.compile did for this model's steps so far: graphs, graph breaks, recompiles. All 0 where it is off."""
    compiler = patch_of(model).compiler
    return CompileReport() if compiler is None else compiler.report


def patch_of(model: Any) -> Patch:
    """The patch a model carries.

    Raises:
        UsageError: it carries none.
    """
    patch: Patch | None = unwrapped(model).__dict__.get(ATTRIBUTE)
    if patch is None:
        raise UsageError("this model carries no policy; call kvpolicy.apply(model, policy) first")
    return patch


def _resolve(policy: str | Path | Policy, params: dict[str, object]) -> Policy:
    if isinstance(policy, Policy):
        return policy.bind(**params) if params else policy
    return load_policy(policy, set=params)


def _compiler(wanted: bool | str) -> StepCompiler | None:
    if wanted == BACKGROUND:
        return BackgroundCompiler()
    return StepCompiler(wanted if isinstance(wanted, str) else "inductor") if wanted else None


def _change(model: PreTrainedModel, patch: Patch, layers: list[Any], traits: TraitHook | None) -> None:
    """The changes, all of them, each through the journal. What a model sees with beside its text stays as it is."""
    journal, policy, decoder = patch.journal, patch.policy, decoder_of(model, patch.architecture)
    name = register(patch.previous)
    journal.set(model, ATTRIBUTE, patch)
    journal.attend_by(model, decoder, name)
    recorded = {"format": FORMAT, "name": policy.name, "digest": policy.digest, "yaml": policy.to_yaml()}
    journal.set(model.config, "kv_policy", recorded)
    if traits is not None:
        alone = model.base_model is model and not patch.architecture.image_token  # its decoder may be called by itself
        journal.before(decoder if alone else model.base_model, traits)
    if patch.architecture.images_see_ahead:
        image = getattr(model.base_model.config, patch.architecture.image_token, None)
        journal.before(model.base_model, TextAlone(image))
    journal.before(decoder, ModelHook(name, len(layers)))
    journal.after(decoder, close_pass)
    for index, layer in enumerate(layers):
        if index in patch.geometry.states:
            journal.before(layer, StateHook())
            continue
        journal.before(layer, LayerHook(index, patch.architecture.temperature))
        if patch.compiler is not None:
            journal.set(layer, "forward", CompiledForward(layer, patch.compiler))
    if model.can_generate():
        journal.set(model, "_prepare_cache_for_generation", CacheBuilder(model, patch))
        if prepares_by_itself(model):
            journal.set(model, "prepare_inputs_for_generation", CacheKeeper(model))
        if hasattr(model, "init_continuous_batching"):
            journal.set(model, "init_continuous_batching", NoPagedCache(policy.name))
