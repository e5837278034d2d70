"""Compile generated steps in another process, while this one decodes eagerly, and take them over when they are there.

A thread would not do: while torch traces, it replaces methods of every `nn.Module` and sets flags that model code asks,
for the whole process. Another process touches nothing here. It gets a decoder layer without its weights and a plan,
compiles each kind of step, and leaves the code in the folder of artefacts, from which this process then takes it.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.attention import Rotation
from kvpolicy.patching.attention import register
from kvpolicy.plan import LayerPlan, LocalPlan, Plan
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.compiling import CompiledForward, StepCompiler

BACKGROUND = "background"
Notify = Callable[[str], None]


@dataclass
class Job:
    """All that another process needs: a decoder layer on no device, a plan of that layer alone, and inputs.

    hidden, rotation: shape and dtype of what the layer is called with; temperature: the architecture's; compiler: the
    backend of torch.compile; turns: how keys rotate, where positions are compact.
    """

    layer: nn.Module
    previous: str
    plan: Plan
    device: torch.device
    backend: str
    compiler: str
    kinds: tuple[str, ...]
    hidden: tuple[torch.Size, torch.dtype]
    rotation: tuple[tuple[torch.Size, torch.dtype], ...]
    temperature: Callable[[Any, Any], Any] | None
    training: bool
    inference: bool
    threads: int
    turns: Rotation | None

    def run(self) -> None:
        """Compile, in the process that this was sent to."""
        register(self.previous)
        torch.set_num_threads(self.threads)
        layer = self.layer.to_empty(device=self.device).train(self.training)
        with torch.inference_mode(False):
            cache = PolicyCache(self.plan, device=self.device, backend=self.backend, rotation=self.turns)
        hidden = torch.zeros(self.hidden[0], dtype=self.hidden[1], device=self.device)
        # Two tensors and not one twice: torch would compile for that.
        angles = tuple(torch.zeros(shape, dtype=dtype, device=self.device) for shape, dtype in self.rotation)
        arguments: dict[str, Any] = {}
        if angles:
            arguments["position_embeddings"] = angles if len(angles) > 1 else angles[0]
        if self.temperature is not None:
            arguments["kv_temperature"] = self.temperature
        forward = CompiledForward(layer, StepCompiler(self.compiler))
        with torch.inference_mode() if self.inference else torch.no_grad():
            for kind in self.kinds:
                cache.advance(kind)
                forward(hidden, kv_layer=cache.layers[0], **arguments)


class BackgroundCompiler(StepCompiler):
    """Says of each call of a layer whether it may be compiled yet; sends the work away when it first comes up.

    One job at a time. Where a job fails, a warning says why, and steps stay eager.
    """

    takes_tokens = False

    def __init__(self, backend: str = "inductor", notify: Notify = lambda line: None) -> None:
        super().__init__(backend)
        self.notify, self.settled = notify, True
        self._process: tuple[Hashable, subprocess.Popen[bytes], Path, float] | None = None
        self._done: dict[Hashable, bool] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return BackgroundCompiler, (self.backend,)

    def ready(self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> bool:
        """Whether this pass may run a compiled step: what it needs lies on disk, or was compiled here before."""
        state = (layer.training, torch.is_inference_mode_enabled())
        key = (self._form(layer), self._shape(arguments["kv_layer"]), hidden.shape, hidden.dtype, hidden.device, *state)
        with self._making:
            if self._process is not None:
                self._look()
            if key not in self._done and self._process is None:
                self._send(key, _job(layer, hidden, arguments, str(self.backend)))
            self.settled = key in self._done
            return self._done.get(key, False)

    def close(self) -> None:
        """Stop what is under way."""
        if self._process is not None:
            _stop(*self._process[1:3])
            self._process = None

    def _send(self, key: Hashable, job: Job) -> None:
        handle, name = tempfile.mkstemp(prefix="kvpolicy-", suffix=".job")
        with os.fdopen(handle, "wb") as file:
            pickle.dump(job, file)
        with open(f"{name}.log", "wb") as log:
            command = [sys.executable, "-m", "kvpolicy.patching.ahead", name]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        weakref.finalize(self, _stop, process, Path(name))
        self._process = (key, process, Path(name), time.monotonic())
        self.notify("compiling the step in another process; tokens come eagerly meanwhile")

    def _look(self) -> None:
        assert self._process is not None
        key, process, file, start = self._process
        if process.poll() is None:
            return
        said = Path(f"{file}.log").read_text(errors="replace").strip().splitlines()
        self._process, self._done[key] = None, process.returncode == 0
        _stop(process, file)
        if process.returncode:
            warnings.warn(
                f"the step could not be compiled in another process ({said[-1] if said else 'it said nothing'}); steps "
                "stay eager. apply with compile=True to compile them here, or compile=False",
                stacklevel=2,
            )
        else:
            self.notify(f"compiled in {time.monotonic() - start:.0f} s; the next tokens come from compiled steps")


def _stop(process: subprocess.Popen[bytes], file: Path) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    for path in (file, Path(f"{file}.log")):
        path.unlink(missing_ok=True)


def _job(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], compiler: str) -> Job:
    """What to send for one layer of a model: its modules without hooks or weights, and its plan."""
    kv_layer, turned = arguments["kv_layer"], arguments.get("position_embeddings")
    angles = (turned,) if isinstance(turned, Tensor) else turned or ()
    memo: dict[int, Any] = {}
    for tensor in (*layer.parameters(), *layer.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    twin = copy.copy(layer)
    twin.__dict__ = {name: value for name, value in layer.__dict__.items() if name != "forward"}
    twin = copy.deepcopy(twin, memo)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return Job(
        layer=twin,
        previous=_previous(layer),
        plan=_alone(kv_layer.moment.plan, kv_layer.plan),
        device=hidden.device,
        backend=kv_layer.backend,
        compiler=compiler,
        kinds=kv_layer.moment.kinds,
        hidden=(hidden.shape, hidden.dtype),
        rotation=tuple(
            (torch.Size((*each.shape[:-3], hidden.shape[0], *each.shape[-2:])), each.dtype) for each in angles
        ),
        temperature=arguments.get("kv_temperature"),
        training=layer.training,
        inference=torch.is_inference_mode_enabled(),
        threads=torch.get_num_threads(),
        turns=kv_layer.moment.rotation,
    )


def _alone(plan: Plan, layer: LayerPlan | LocalPlan) -> Plan:
    """The plan of a cache whose first layer is this one; beside a local one there must be one that is governed."""
    local = (replace(layer, layer=replace(layer.layer, index=0)),) if isinstance(layer, LocalPlan) else ()
    geometry = replace(plan.geometry, layers=1, local=tuple(each.layer for each in local), states=())
    layers = plan.layers[:1] if isinstance(layer, LocalPlan) else (layer,)
    return replace(plan, geometry=geometry, layers=layers, local=local)


def _previous(layer: nn.Module) -> str:
    """What the model attended with before the policy came: the name that its layers' config carries, without ours."""
    for module in layer.modules():
        config = getattr(module, "config", None)
        if config is not None:
            return str(config._attn_implementation).partition("|")[2]
    return "sdpa"


if __name__ == "__main__":
    try:
        with open(sys.argv[1], "rb") as received:
            pickle.load(received).run()
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
