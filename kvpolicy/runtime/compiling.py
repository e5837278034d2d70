"""Compile the decoder layer, not the model: one graph per kind of step, shared by all layers of equal shape.

Prompt passes are eager. Each (layer shape, kind of step, state of torch) has its own compiled object that may compile
once: a second graph raises, where torch would fall back to eager in silence after a few.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from kvpolicy.errors import ModelError
from kvpolicy.plan import LayerPlan, LocalPlan
from kvpolicy.runtime.artefacts import artefacts_kept
from kvpolicy.runtime.moment import GIVEN, PROMPT
from kvpolicy.runtime.tracing import TRACING
from kvpolicy.runtime.unchanged import Unchanged, made_of

CAPTURE = "transformers.utils.output_capturing"

SETTING = bool | int | float | str | None
"""Of these types are the attributes of a module that its code may branch on."""

# torch 2.13 and later: without it the limit is held by our backend alone.
_LIMIT: dict[str, Any] = (
    {"recompile_limit": 1} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
)


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

    def ready(self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> bool:
        """Whether this pass may be compiled: at once."""
        return True

    def close(self) -> None:
        """The policy came off."""

    def step(self, layer: nn.Module, kv_layer: Any, hidden_states: Tensor, make: Hashable = None) -> CompiledStep:
        """The compiled object for this layer and this pass; ``make``: what the layer is made of (`made_of`).

        Its key is all that may lawfully differ between two graphs; whatever else changes is a recompile, and raises.
        """
        key = (
            self._form(layer),
            make,
            self._shape(kv_layer),
            kv_layer.moment.kind,
            kv_layer.backend,
            layer.training,
            hidden_states.dtype,
            hidden_states.device,
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(),
            hidden_states.shape,
            torch.get_num_threads(),
        )
        if key not in self._steps:
            with self._making:
                if key not in self._steps:
                    name = f"{type(layer).__name__}_{kv_layer.moment.kind}_{len(self._steps)}"
                    self._steps[key] = CompiledStep(name, self.backend)
        return self._steps[key]

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


class CompiledStep:
    """One compiled decoder layer; calling it a second time with what its guards refuse raises a ModelError.

    ``direct`` is the compiled code without its guards, for who knows that they hold; None where torch hides it.
    """

    def __init__(self, name: str, backend: str | Callable[..., Any]) -> None:
        self.name, self.graphs, self.breaks = name, 0, 0
        self._backend = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        # dynamo keeps graphs by code object: a copy has its own, so no other model's graphs count against its limit.
        code = decoder_step.__code__.replace(co_name=name)
        function = types.FunctionType(code, decoder_step.__globals__, name)
        self.direct: Callable[[nn.Module, Tensor, dict[str, Any]], Tensor] | None = None
        self._code = code
        self._ran = False
        entry = _Entry(weakref.ref(self))
        self._compiled = torch.compile(function, backend=entry, fullgraph=True, dynamic=False, **_LIMIT)
        weakref.finalize(self, entry.leave, code).atexit = False

    def __call__(self, layer: nn.Module, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        if not self._ran:
            with TRACING.trace():
                if not self._ran:  # unless another thread was first
                    return self._run_first(layer, hidden_states, arguments)
        with TRACING.run():
            return self._run(layer, hidden_states, arguments)

    def _run_first(self, layer: nn.Module, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The call that compiles."""
        before = sum(counters["graph_break"].values())
        try:
            with _without_capture(layer):
                result = self._run(layer, hidden_states, arguments)
            self.direct = _without_guards(self._code)
            self._ran = True
            return result
        finally:
            self.breaks += sum(counters["graph_break"].values()) - before

    def _run(self, *arguments: Any) -> Tensor:
        try:
            return self._compiled(*arguments)
        except (torch._dynamo.exc.FailOnRecompileLimitHit, torch._dynamo.exc.BackendCompilerFailed) as error:
            if not self.graphs:
                raise
            raise ModelError(
                f"{self.name} would need a second graph: something changed that its first one took for fixed. Run with "
                "TORCH_LOGS=recompiles to see what, or apply the policy with compile=False"
            ) from error

    def compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        self.graphs += 1
        if self.graphs > 1:
            raise RuntimeError(f"{self.name} compiled twice")
        with artefacts_kept():
            return self._backend(graph, inputs, **options)


@dataclass(eq=False)
class _Entry:
    """What torch knows a step's backend by. torch keeps the backends that it was given, and what it compiled with them,
    for as long as the process lives: this one does not hold the step, and goes when that goes."""

    step: weakref.ref[CompiledStep]

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        step = self.step()
        assert step is not None
        return step.compile(graph, inputs, **options)

    def leave(self, code: types.CodeType) -> None:
        """Take out of torch's lists the backend, and what was compiled for ``code``, which holds itself there."""
        known: dict[int, Any] = getattr(torch._dynamo.eval_frame, "cached_backends", {})
        for key, backend in list(known.items()):
            if getattr(backend, "compiler_fn", backend) is self:
                known.pop(key, None)
        getattr(torch._dynamo, "reset_code", lambda code: None)(code)


def _without_guards(code: types.CodeType) -> Callable[..., Tensor] | None:
    """The bytecode that dynamo made of a function it has compiled once, as a function of its own.

    Calling it is what a call under dynamo comes to once the guards held. torch's own switch for that
    (``skip_guard_eval_unsafe``) holds for the whole process, other models and threads included; this does not.
    """
    entries: list[Any] = getattr(torch._dynamo.eval_frame, "_debug_get_cache_entry_list", lambda code: [])(code)
    if len(entries) != 1:
        return None
    # Names of its own: `torch._dynamo.reset` takes the compiled function out of the module's.
    return types.FunctionType(entries[0].code, dict(decoder_step.__globals__))


def decoder_step(layer: nn.Module, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The region that is compiled: one decoder layer, as its class defines it."""
    return type(layer).forward(layer, hidden_states, **arguments)


@contextmanager
def _without_capture(layer: nn.Module) -> Iterator[None]:
    """Hide transformers' output-capturing hooks on the modules inside a layer while it is traced.

    dynamo cannot trace the context variable they read, and inside a layer they wait for attention maps, of which a
    policy's cache has none. The hook for hidden states hangs on the layer itself, which stays outside the graph.
    """
    hidden = {}
    for module in layer.modules():
        hooks = module._forward_hooks
        if module is not layer and any(hook.__module__ == CAPTURE for hook in hooks.values()):
            hidden[module] = hooks
            kept = [(key, hook) for key, hook in hooks.items() if hook.__module__ != CAPTURE]
            module._forward_hooks = OrderedDict(kept)
    try:
        yield
    finally:
        for module, hooks in hidden.items():
            module._forward_hooks = hooks


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
        if kv_layer is None or kv_layer.moment.kind in (PROMPT, GIVEN):
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
