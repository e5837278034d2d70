"""Compile the decoder layer, not the model: one graph per kind of step, shared by all layers of equal shape.

Prompt passes are eager. Each (layer shape, kind of step, state of torch) has its own compiled object that may compile
once: a second graph raises, where torch would fall back to eager in silence after a few.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.attention import Formula
from kvpolicy.plan import LayerPlan, LocalPlan
from kvpolicy.runtime.compiled import CompiledStep
from kvpolicy.runtime.moment import GIVEN, PROMPT
from kvpolicy.runtime.tracing import TRACING
from kvpolicy.runtime.unchanged import Unchanged, made_of

SETTING = bool | int | float | str | None
"""Of these types are the attributes of a module that its code may branch on."""


@dataclass(frozen=True)
class CompileReport:
    """What torch.compile did: `graphs` compiled, `graph_breaks` met, and `recompiles` of a graph that existed."""

    graphs: int = 0
    graph_breaks: int = 0
    recompiles: int = 0


class StepCompiler:
    """The compiled decoder layers of one model.

    backend: as torch.compile takes it. Copies and pickles start empty: compiled code belongs to a process.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.backend = backend
        self._steps: dict[Hashable, CompiledStep] = {}
        self._shapes: dict[LayerPlan | LocalPlan, int] = {}
        self._numbers = itertools.count()  # its `next` is one operation: two threads never get the same number
        self._making = threading.Lock()
        self._shape_of: weakref.WeakKeyDictionary[Any, tuple[LayerPlan | LocalPlan, int]] = weakref.WeakKeyDictionary()
        self._forms: dict[Hashable, int] = {}
        self._form_of: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return StepCompiler, (self.backend,)

    @property
    def report(self) -> CompileReport:
        """Counts over every step compiled so far."""
        graphs = sum(step.graphs for step in self._steps.values())
        started = sum(step.graphs > 0 for step in self._steps.values())
        return CompileReport(graphs, sum(step.breaks for step in self._steps.values()), graphs - started)

    settled = True
    """Whether nothing that is now eager will be compiled later."""

    takes_tokens = True
    """Whether it compiles the steps inside a pass of many tokens, too."""

    def ready(self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> bool:
        """Whether this pass may be compiled: at once."""
        return True

    def close(self) -> None:
        """The policy came off."""

    def step(self, layer: nn.Module, kv_layer: Any, hidden_states: Tensor, make: Hashable = None) -> CompiledStep:
        """The compiled object for this layer and this pass; ``make``: what the layer is made of (`made_of`).

        Its key is all that may lawfully differ between two graphs; whatever else changes is a recompile, and raises.
        """
        key = (self._form(layer), make, layer.training, *self._pass(kv_layer, hidden_states))
        return self._made(key, f"{type(layer).__name__}_{kv_layer.moment.kind}", decoder_step)

    def token_step(self, kv_layer: Any, query: Tensor, formula: Formula) -> CompiledStep:
        """The same for a cache layer alone, in the midst of a pass of many tokens (runtime/given.py)."""
        made = (formula.scaling, formula.softcap, formula.sinks is None, kv_layer.ahead is None)
        key = (made, *self._pass(kv_layer, query))
        return self._made(key, f"{type(kv_layer).__name__}_{kv_layer.moment.kind}", token_step)

    def _made(self, key: Hashable, name: str, function: Callable[..., Tensor]) -> CompiledStep:
        if key not in self._steps:
            with self._making:
                if key not in self._steps:
                    self._steps[key] = CompiledStep(f"{name}_{len(self._steps)}", function, self.backend)
        return self._steps[key]

    def _pass(self, kv_layer: Any, tensor: Tensor) -> tuple[Hashable, ...]:
        """Of a key: the cache layer, the pass, what goes into it, and the state of torch."""
        return (
            self._shape(kv_layer),
            kv_layer.moment.kind,
            kv_layer.backend,
            tensor.dtype,
            tensor.device,
            tensor.shape,
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(),
            torch.get_num_threads(),
        )

    def _form(self, layer: nn.Module) -> int:
        """Layers of one form run alike. It is looked at once: what a layer says later is a change, not a form."""
        known = self._form_of.get(layer)
        if known is None:
            self._form_of[layer] = known = self._forms.setdefault(form_of(layer), next(self._numbers))
        return known

    def _shape(self, kv_layer: Any) -> int:
        """Layers of one shape run alike. Comparing plans is slow: once per cache."""
        known = self._shape_of.get(kv_layer)
        if known is None or known[0] is not kv_layer.plan:
            shape = self._shapes.setdefault(kv_layer.plan.shape, next(self._numbers))
            self._shape_of[kv_layer] = known = (kv_layer.plan, shape)
        return known[1]


def form_of(layer: nn.Module) -> Hashable:
    """What the code of a decoder layer goes by: its modules, the shapes of what they hold, and their settings.

    Layers of one class may differ in it: some have experts, some turn no keys. Which layer it is (`layer_idx`) is left
    out, for no pass over a policy's cache reads it.
    """
    form: list[Hashable] = []
    for name, part in layer.named_modules():
        settings = {key: value for key, value in vars(part).items() if isinstance(value, SETTING) and key[0] != "_"}
        tensors = {**part._parameters, **part._buffers}
        shapes = ((key, tuple(tensor.shape)) for key, tensor in tensors.items() if tensor is not None)
        form.append(
            (name, type(part), frozenset(settings.items() - {("layer_idx", settings.get("layer_idx"))}), *shapes)
        )
    return tuple(form)


def decoder_step(layer: nn.Module, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The region that is compiled: one decoder layer, as its class defines it."""
    return type(layer).forward(layer, hidden_states, **arguments)


def token_step(kv_layer: Any, query: Tensor, key: Tensor, value: Tensor, formula: Formula, kind: str) -> Tensor:
    """The region that is compiled of a pass of many tokens: one of them, in one cache layer."""
    said: Tensor = kv_layer.take(query, key, value, formula, kind)
    return said


class TokenSteps:
    """One pass of many tokens in one cache layer, token by token through compiled steps.

    Nothing that a guard asks about changes between two of its tokens but their kind: so guards are asked once for each
    kind, and every further token of that kind goes without.
    """

    def __init__(self, compiler: StepCompiler) -> None:
        self.compiler = compiler
        self._held: dict[tuple[str, bool], Callable[..., Tensor]] = {}

    def __call__(self, kv_layer: Any, query: Tensor, key: Tensor, value: Tensor, formula: Formula, kind: str) -> Tensor:
        state = (kind, kv_layer.ahead is None)
        held = self._held.get(state)
        if held is not None:
            return held(kv_layer, query, key, value, formula, kind)
        step = self.compiler.token_step(kv_layer, query, formula)
        said = step(kv_layer, query, key, value, formula, kind, inside=True)
        if step.direct is not None:
            self._held[state] = step.direct
        return said


@dataclass(frozen=True)
class Known:
    """What is known of a layer while it stays what it was: what it is made of, and the steps whose guards have held
    since. Frozen, and so replaced as a whole: threads share it."""

    snapshot: Unchanged
    make: Hashable
    held: frozenset[CompiledStep]


class CompiledForward:
    """Stands in for `forward` on one decoder layer: compiled for generated steps over a policy's cache, else as before.

    A callable object and not a closure, so that the layer can be pickled and deep-copied.
    """

    def __init__(self, layer: nn.Module, compiler: StepCompiler) -> None:
        self.layer, self.compiler = layer, compiler
        self._known: Known | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "compiler": self.compiler, "_known": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kv_layer = kwargs.get("kv_layer")
        if kv_layer is None or kv_layer.moment.kind == PROMPT:
            return self._eager(*args, **kwargs)
        if kv_layer.moment.kind == GIVEN:
            kv_layer.moment.compiler = self.compiler if self.compiler.takes_tokens else None
            return self._eager(*args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if not self.compiler.ready(self.layer, hidden_states, kwargs):
            return self._eager(*args, **kwargs)
        known = self._known
        if known is not None and not known.snapshot.still():
            known = None
        make = made_of(self.layer) if known is None else known.make
        rows = hidden_states.shape[0]
        step = self.compiler.step(self.layer, kv_layer, hidden_states, make)
        hidden_states, arguments = _canonical(hidden_states, rows), _step_arguments(kwargs, rows)
        if known is not None and step in known.held and step.direct is not None:
            with TRACING.run():
                return step.direct(self.layer, hidden_states, arguments)
        result = step(self.layer, hidden_states, arguments)
        known = known or Known(Unchanged(self.layer), make, frozenset())
        self._known = replace(known, held=known.held | {step})
        return result

    def _eager(self, *args: Any, **kwargs: Any) -> Any:
        with TRACING.run():
            return type(self.layer).forward(self.layer, *args, **kwargs)


def _step_arguments(kwargs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The keywords of a decoder layer in one fixed form, whoever called the model.

    `position_ids` are dropped: a decoder layer reads the rotation only, and a caller may leave them out.
    """
    ours = {name: value for name, value in kwargs.items() if name.startswith("kv_")}
    given = {"attention_mask": None, "past_key_values": None, **ours}
    turned = kwargs.get("position_embeddings")  # cos and sin; of Llama 4 one complex tensor; none of Jamba
    if isinstance(turned, Tensor):
        given["position_embeddings"] = _canonical(turned, rows)
    elif turned is not None:
        given["position_embeddings"] = tuple(_canonical(each, rows) for each in turned)
    return given


def _canonical(tensor: Tensor, rows: int) -> Tensor:
    """The same numbers [..., rows, N, D], one row per sequence, with the strides of a fresh tensor.

    A graph is guarded by strides, also those of a dimension of size 1: a view such as `ids[:, -1:]` would cost a second
    graph, and so would positions that are given once for all rows.
    """
    if tensor.shape[-3] != rows:
        tensor = tensor.expand(*tensor.shape[:-3], rows, *tensor.shape[-2:])
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return tensor.clone(memory_format=torch.contiguous_format)
        expected *= size
    return tensor
