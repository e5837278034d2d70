"""Record a function that only gives the device work, and replay that work: CUDA graphs, and what a CPU has instead.

A recorded function must read and write tensors that keep their addresses, take nothing and return nothing, and ask the
device nothing: a replay runs none of its Python.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

Work = Callable[[], None]


class Recorder(Protocol):
    """``run`` one function after another, each as often as it likes; it may record one and replay it from then on."""

    def run(self, function: Work, ready: bool) -> None:
        """Do the work of ``function`` once. It may be recorded only where it is ``ready``: compiled, if ever it is.

        The same function is asked for by the same object.
        """

    def forget(self) -> None:
        """Drop every record."""


class NoRecorder:
    """Calls the function: on the CPU, and where nothing may be captured."""

    def run(self, function: Work, ready: bool) -> None:
        function()

    def forget(self) -> None:
        """Nothing was recorded."""


class CudaRecorder:
    """CUDA graphs, one for each function, in one memory pool.

    The first ``warm_up`` runs of a function are plain calls, on the stream that records: kernels are compiled and
    libraries make their workspaces there. They are runs like any other, so nothing happens twice. The pool can be
    shared because graphs are replayed one at a time and no tensor inside one is read after it: what a step gives lies
    in tensors that were allocated before. The default generator of the device is registered by ``torch.cuda.graph``,
    and each replay draws new numbers from it.
    """

    def __init__(self, device: torch.device, warm_up: int = 2) -> None:
        self.device, self.warm_up = device, warm_up
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._runs: dict[Work, int] = {}
        self._graphs: dict[Work, Any] = {}
        self._refused = False

    def run(self, function: Work, ready: bool) -> None:
        graph = self._graphs.get(function)
        if graph is None and ready and not self._refused and self._runs.get(function, 0) >= self.warm_up:
            graph = self._graphs[function] = self._capture(function)
        if graph is not None:
            graph.replay()
            return
        with self._aside():
            function()
        if ready:
            self._runs[function] = self._runs.get(function, 0) + 1

    def forget(self) -> None:
        """Drop every graph, and with the last of them their pool."""
        self._runs.clear()
        self._graphs.clear()
        self.pool = torch.cuda.graph_pool_handle()

    def _capture(self, function: Work) -> Any:
        """Record without running. Where that is impossible, say so once, and run as before."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        try:
            # A capture that fails leaves its stream the current one: the context around it puts ours back.
            with torch.cuda.stream(current), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                function()
        except RuntimeError as error:
            self._refused = True
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"generated steps of this model cannot be captured as a CUDA graph ({reason}); they run one kernel at "
                "a time. DecodeLoop(capture=False) does so from the start",
                stacklevel=2,
            )
            return None
        return graph

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Run on the recording stream, in order with the current one."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)


def recorder_for(device: torch.device, capture: bool | None = None) -> Recorder:
    """What records on this device; ``capture`` None: CUDA graphs on CUDA, nothing elsewhere."""
    wanted = device.type == "cuda" if capture is None else capture and device.type == "cuda"
    return CudaRecorder(device) if wanted else NoRecorder()
