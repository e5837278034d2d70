"""A region that torch.compile takes whole and once: a second graph raises, where torch would make one in silence."""

from __future__ import annotations

import inspect
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from kvpolicy.errors import ModelError
from kvpolicy.runtime.artefacts import artefacts_kept
from kvpolicy.runtime.tracing import TRACING

CAPTURE = "transformers.utils.output_capturing"

# torch 2.13 and later: without it the limit is held by our backend alone.
_LIMIT: dict[str, Any] = (
    {"recompile_limit": 1} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
)


class CompiledStep:
    """A function, compiled once; calling it a second time with what its guards refuse raises a ModelError.

    ``direct`` is the compiled code without its guards, for who knows that they hold; None where torch hides it.
    """

    def __init__(self, name: str, function: Callable[..., Tensor], backend: str | Callable[..., Any]) -> None:
        self.name, self.graphs, self.breaks = name, 0, 0
        self._backend = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        # dynamo keeps graphs by code object: a copy has its own, so no other model's graphs count against its limit.
        assert isinstance(function, types.FunctionType)
        code = function.__code__.replace(co_name=name)
        own = types.FunctionType(code, function.__globals__, name)
        self.direct: Callable[..., Tensor] | None = None
        self._code, self._globals = code, function.__globals__
        self._ran = False
        entry = _Entry(weakref.ref(self))
        self._compiled = torch.compile(own, backend=entry, fullgraph=True, dynamic=False, **_LIMIT)
        weakref.finalize(self, entry.leave, code).atexit = False

    def __call__(self, first: Any, *others: Any, inside: bool = False) -> Tensor:
        """Run it.

        Args:
            inside: whether who calls is running already, as ``TRACING`` has it.
        """
        if not self._ran:
            with TRACING.trace(inside=inside):
                if not self._ran:  # unless another thread was first
                    return self._run_first(first, *others)
        with nullcontext() if inside else TRACING.run():
            return self._run(first, *others)

    def _run_first(self, first: Any, *others: Any) -> Tensor:
        """The call that compiles."""
        before = sum(counters["graph_break"].values())
        try:
            with _without_capture(first) if isinstance(first, nn.Module) else nullcontext():
                result = self._run(first, *others)
            self.direct = _without_guards(self._code, self._globals)
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


def _without_guards(code: types.CodeType, names: dict[str, Any]) -> Callable[..., Tensor] | None:
    """The bytecode that dynamo made of a function it has compiled once, as a function of its own.

    Calling it is what a call under dynamo comes to once the guards held. torch's own switch for that
    (``skip_guard_eval_unsafe``) holds for the whole process, other models and threads included; this does not.
    """
    entries: list[Any] = getattr(torch._dynamo.eval_frame, "_debug_get_cache_entry_list", lambda code: [])(code)
    if len(entries) != 1:
        return None
    # Names of its own: `torch._dynamo.reset` takes the compiled function out of the module's.
    return types.FunctionType(entries[0].code, dict(names))


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
