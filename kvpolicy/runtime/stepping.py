"""One generated step of a model over a policy's cache, again and again: the innermost part of every decode loop.

A step has two halves. The host's is a few integers: it opens the pass and knows which of the two kinds of step is due.
The device's, everything else, reads and writes tensors that keep their addresses, so that it can be recorded once for
each kind and replayed: the clocks, the model, and the choice of the next token where logits are all that it takes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from kvpolicy.runtime.cache import PolicyCache
from kvpolicy.runtime.choosing import Choice
from kvpolicy.runtime.compiled import CAPTURE
from kvpolicy.runtime.compiling import CompiledForward
from kvpolicy.runtime.recording import Recorder, Work, recorder_for

KEPT_CHOICES = 4  # ways to choose tokens whose recorded steps are kept at once


class Stepper:
    """Runs generated steps of one model over one cache.

    On CUDA, steps are captured as CUDA graphs after a few plain runs and replayed from then on, unless some Python of
    others wants to see every pass (`is_watched`). Elsewhere the same function is called.

    Args:
        capture: None: on CUDA; False: nowhere.
        recorder: another recorder than the device's own.

    Attributes:
        tokens [B, 1]: what the next step is fed; after `advance`, what it chose.
        positions [B, 1]: the place of those tokens in their rows' text; [axes, B, 1] for a model that has several.
        unfinished [B] int64, alive [] bool: rows that have not ended, and whether there is one.
    """

    def __init__(
        self, model: Any, cache: PolicyCache, *, capture: bool | None = None, recorder: Recorder | None = None
    ) -> None:
        self.model, self.cache = model, cache
        self.recorder = recorder or recorder_for(cache.device, capture)
        self.may_record = not is_watched(model)
        self._compilers = {each.compiler for each in _forwards(model) if isinstance(each, CompiledForward)}
        rows, device = cache.plan.batch, cache.device
        with torch.inference_mode(False):
            self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
            self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
            self.unfinished = torch.ones(rows, dtype=torch.int64, device=device)
            self.alive = torch.ones((), dtype=torch.bool, device=device)
        self.logits: Tensor | None = None
        self._column = -1  # the column that `positions` stands at
        self._work: dict[tuple[str, Hashable], Work] = {}
        self._weights = _addresses(model)

    def fits(self, model: Any) -> bool:
        """Whether recorded steps would still run this model: the same object, its weights where they were."""
        return model is self.model and _addresses(model) == self._weights

    def start(self, tokens: Tensor, positions: Tensor | None = None, unfinished: Tensor | None = None) -> None:
        """What comes next: tokens [B, 1], at positions [B, 1], in rows that are `unfinished` [B]; by default columns
        are positions, and no row has ended."""
        self.tokens.copy_(tokens)
        if positions is not None and positions.shape != self.positions.shape:
            self.close()
            with torch.inference_mode(False):
                self.positions = torch.zeros(positions.shape, dtype=torch.int64, device=self.cache.device)
        if positions is None:
            self.positions.fill_(self.cache.get_seq_length())
        else:
            self.positions.copy_(positions)
        self._column = self.cache.get_seq_length()
        if unfinished is None:
            self.unfinished.fill_(1)
        else:
            self.unfinished.copy_(unfinished)

    def step(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """One generated pass: tokens int64 [B, 1] -> logits [B, V]. The result is overwritten by the next step.

        inputs: further keywords of the model, none of them a tensor.
        """
        if self._column != self.cache.get_seq_length():
            self.start(tokens)
        else:
            self.tokens.copy_(tokens)
        self._run(None, inputs)
        assert self.logits is not None
        return self.logits

    def advance(self, choice: Choice, **inputs: Any) -> None:
        """One generated pass that is fed `tokens` and leaves there what it chose, after `start`."""
        self._run(choice, inputs)

    def close(self) -> None:
        """Drop what was recorded: the cache's memory is then free as soon as nobody else has it."""
        self._work.clear()
        self.recorder.forget()

    def _run(self, choice: Choice | None, inputs: dict[str, Any]) -> None:
        cache = self.cache
        kind = cache.open_step()
        work = self._recordable(kind, choice, inputs)
        try:
            if self.may_record:
                self.recorder.run(work, all(compiler.settled for compiler in self._compilers))
            else:
                work()
        except BaseException:
            cache.opened_ahead = False  # the pass stays open: whoever comes next is told that it failed
            raise
        cache.finish()
        self._column += 1

    def _recordable(self, kind: str, choice: Choice | None, inputs: dict[str, Any]) -> Work:
        """The same object for the same work."""
        how = (None if choice is None else choice.key, repr(sorted(inputs.items())))
        if (kind, how) not in self._work:
            known = {other for _, other in self._work}
            if how not in known and len(known) >= KEPT_CHOICES:
                self.close()
            self._work[kind, how] = partial(self._pass, kind, choice, inputs)
        return self._work[kind, how]

    def _pass(self, kind: str, choice: Choice | None, inputs: dict[str, Any]) -> None:
        """All that the device does in one step."""
        cache = self.cache
        cache.opened_ahead = True
        cache.advance(kind)
        outputs = self.model(
            input_ids=self.tokens,
            position_ids=self.positions,
            past_key_values=cache,
            return_dict=True,
            **inputs,
        )
        newest = outputs.logits[:, -1]
        self.positions += 1
        if choice is not None:
            self.tokens.copy_(choice.next(newest, self.unfinished)[:, None])
            self.alive.copy_(self.unfinished.any())
            return
        if self.logits is None:
            with torch.inference_mode(False):
                self.logits = torch.empty(newest.shape, dtype=newest.dtype, device=newest.device)
        self.logits.copy_(newest)


def is_watched(model: nn.Module) -> bool:
    """Whether hooks or replaced forwards of others wait for every pass: a replay would pass them by."""
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return True
    return any(
        any(not _is_known(hook) for hook in chain(module._forward_hooks.values(), module._forward_pre_hooks.values()))
        for module in model.modules()
    ) or any(not _is_known(forward) for forward in _forwards(model))


def _forwards(model: nn.Module) -> Iterator[Any]:
    """Forwards that were put in place of what a module's class says."""
    return (vars(module)["forward"] for module in model.modules() if "forward" in vars(module))


def _is_known(hook: Any) -> bool:
    """Ours, which a step without it does the work of, or transformers' for outputs that nobody asked for."""
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home == CAPTURE or home.partition(".")[0] == "kvpolicy"


def _addresses(model: nn.Module) -> int:
    return hash(tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers())))
