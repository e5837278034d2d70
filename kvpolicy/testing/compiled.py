"""Layers' generated passes, compiled: one graph for each layer shape and kind of step, and no second one."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.attention import Formula
from kvpolicy.plan import LayerPlan
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.testing.beside import Run, run_layer


class CompiledRun:
    """``run_layer``, compiled, for ``Beside(generated=…)``.

    Layers whose plans differ in their index alone share a graph. What a graph took for fixed may not change: where it
    would be compiled again, ``RuntimeError`` is raised.
    """

    def __init__(self) -> None:
        self._runs: dict[Hashable, Run] = {}
        self._shapes: dict[LayerPlan, int] = {}
        self._shape_of: dict[int, int] = {}

    @property
    def graphs(self) -> int:
        """Graphs compiled so far."""
        return len(self._runs)

    def __call__(self, layer: PolicyLayer, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
        at = self._shape_of.get(layer.plan.index)  # comparing plans is slow: once a layer
        if at is None:
            at = self._shapes.setdefault(replace(layer.plan, index=0), len(self._shapes))
            self._shape_of[layer.plan.index] = at
        kind = (at, layer.moment.kind)
        if kind not in self._runs:
            self._runs[kind] = compiled_once(f"run_layer_{at}_{layer.moment.kind}")
        return self._runs[kind](layer, query, key, value, formula)


def compiled_once(name: str) -> Run:
    """``run_layer`` that compiles once, in full."""
    # dynamo keeps graphs by code object: a copy has its own, so that no other test's graphs count against its limit.
    copy = types.FunctionType(run_layer.__code__.replace(co_name=name), run_layer.__globals__, name)
    inductor = torch._dynamo.lookup_backend("inductor")
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        if graphs > 1:
            raise RuntimeError(f"{name} needs a second graph: something changed that its first one took for fixed")
        return inductor(graph, inputs, **options)

    run: Run = torch.compile(copy, backend=backend, fullgraph=True, dynamic=False)
    return run
