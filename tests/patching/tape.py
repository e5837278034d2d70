"""A recorder for the CPU that keeps to the rules of CUDA graphs: what it replays is operations on fixed tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpolicy.runtime.recording import Work
from kvpolicy.runtime.waiting import no_waiting


class Tape(TorchDispatchMode):
    """Notes every operation, and takes back what it wrote: capturing a step must not be a step."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for given, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._save(given)
        for argument in func._schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
                self._save(kwargs[argument.name])
        output = func(*args, **kwargs)
        if not any(returned.alias_info is not None for returned in func._schema.returns):
            self._made |= {each.untyped_storage()._cdata for each in tree_leaves(output) if isinstance(each, Tensor)}
        self.operations.append((func, args, kwargs, output))
        return output

    def _save(self, given: Any) -> None:
        for tensor in tree_leaves(given):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._made | self._before.keys():
                self._before[storage._cdata] = (storage, storage.clone())

    def rewind(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        for func, args, kwargs, output in self.operations:
            again = func(*args, **kwargs)
            if any(returned.alias_info is not None for returned in func._schema.returns):
                continue
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


class TapeRecorder:
    """Records each function at its second run, and holds it to asking the host nothing."""

    def __init__(self, warm_up: int = 1) -> None:
        self.warm_up = warm_up
        self.runs: dict[Work, int] = {}
        self.tapes: dict[Work, Tape] = {}
        self.replays = 0

    def run(self, function: Work, ready: bool) -> None:
        if function not in self.tapes and self.runs.get(function, 0) >= self.warm_up and ready:
            state, tape = torch.get_rng_state(), Tape()
            with no_waiting(), tape:
                function()
            tape.rewind()
            torch.set_rng_state(state)
            self.tapes[function] = tape
        if function in self.tapes:
            self.tapes[function].replay()
            self.replays += 1
            return
        function()
        self.runs[function] = self.runs.get(function, 0) + 1

    def forget(self) -> None:
        self.tapes.clear()
        self.runs.clear()
