"""Recorded attention: reads and writes traces, and turns the `attention:` of a test, pattern or trace, into a text.

A file is opened when it is first asked for numbers, and a layer is read when it is first looked at. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from kvpolicy.errors import UsageError
from kvpolicy.language.base import Complaint
from kvpolicy.language.nodes import shown
from kvpolicy.plan import Plan
from kvpolicy.testing.arguments import READERS, read_arguments, within
from kvpolicy.testing.attention import Attention
from kvpolicy.testing.patterns import synthesize
from kvpolicy.testing.tokens import read_tokens, spelled
from kvpolicy.testing.trace_file import STORED, WHAT, About, Array, TraceWriter, bits, floats, name_of

__all__ = ["About", "PlanOf", "Trace", "read_trace", "replay", "text_of", "write_trace"]

PlanOf = Callable[[Attention], Plan]
"""The plan of a policy for a text."""


def text_of(arguments: Mapping[str, Any], *, near: str, plan_of: PlanOf | None = None) -> Attention:
    """The text that the `attention:` of a test describes.

    Args:
        arguments: a pattern with its arguments (see ``synthesize``), or a trace with those of ``replay``.
        near: the file in which it is written (a policy's ``source``); a trace's path starts from its folder, or from
            the working directory where there is no such file.
        plan_of: what a pattern that works against a policy is told of it.

    Raises:
        Complaint: what makes no sense; its path names the argument.
    """
    if "trace" not in arguments:
        return synthesize(arguments, plan_of)
    if "pattern" in arguments:
        raise Complaint("either a `pattern` or a `trace`", "drop one", ("pattern",), "key")
    beside = Path(near).parent if Path(near).is_file() else Path()
    readers = {
        **READERS,
        "str": lambda value: str(beside / Path(_path(value)).expanduser()),
        "Places": lambda value: read_tokens(value, 10**6),
    }
    return replay(**read_arguments(replay, arguments, readers))


Places = tuple[int, ...]
"""Numbers of layers or rows: `3`, `0..3`, or a list of these."""


def replay(trace: str, layers: Places = (), rows: Places = (), steps: int | None = None) -> Attention:
    """What was recorded: ``layers`` (the model's numbers; all recorded ones) and ``rows`` (all) of it, and of its
    generated tokens the first ``steps`` (all). The policy numbers the layers that it is given from 0.
    """
    with within("trace"):
        opened = Trace(Path(trace))
    return opened.text(layers, rows, steps)


def read_trace(path: str | Path, *, layers: Places = (), rows: Places = (), steps: int | None = None) -> Attention:
    """A recorded text; its layers are read from the file when they are first used.

    Args:
        layers: numbers of the model's layers, ascending; all that were recorded unless given. ``rows`` likewise.
        steps: how many of the generated tokens; all unless given.

    Raises:
        UsageError: there is no such file, layer, row or token, or the file is no trace.
    """
    try:
        return replay(str(path), layers, rows, steps)
    except Complaint as complaint:
        raise UsageError("; ".join(part for part in (complaint.reason, complaint.hint) if part)) from None


def write_trace(path: str | Path, said: Attention, about: About) -> int:
    """Write a text that lies in memory; its layers are numbered as ``about.layers`` says. Returns the file's bytes.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        with TraceWriter(Path(path), about.dtype) as writer:
            for row in range(said.rows):
                for index, layer in enumerate(about.layers):
                    for what in WHAT:
                        numbers = np.asarray(getattr(said, what)[row][index]).swapaxes(0, 1)
                        stored = bits(numbers) if about.dtype == "bfloat16" else numbers
                        writer.append(row, layer, what, stored.astype(STORED[about.dtype][1], copy=False))
            return writer.finish(about)
    except OSError as error:
        raise UsageError(f"cannot write the trace to {path}: {error.strerror}") from None


class Trace:
    """A trace file. What it is ``about`` is read at once, numbers when they are asked for.

    Raises:
        Complaint: there is no such file, or it is no trace, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise Complaint(f"there is no file `{path}`", "record one with `kvpolicy trace … -o FILE`")
        try:
            with safe_open(str(path), framework="numpy") as file:
                self.about = About.read(file.metadata() or {})
                self._check({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118 (it is no mapping)
        except (SafetensorError, OSError) as error:
            raise Complaint(f"`{path}` cannot be read: {error}", "record it anew") from None

    def text(self, layers: Places = (), rows: Places = (), steps: int | None = None) -> Attention:
        """A part of it, or all. Raises Complaint where there is no such part; its path names the argument."""
        about = self.about
        self._exist("layers", layers, about.layers)
        self._exist("rows", rows, range(len(about.prompts)))
        if steps is not None and steps > about.steps:
            raise Complaint(f"{about.steps} generated tokens were recorded", f"`steps` is 0..{about.steps}", ("steps",))
        chosen, steps = rows or range(len(about.prompts)), about.steps if steps is None else steps
        if not max(about.prompts[row] for row in chosen) + steps:
            raise Complaint("a text of no tokens", "use more `steps`", ("steps",))
        queries, keys, values = (
            tuple(cast(Array, Layers(self, row, layers or about.layers, what, steps)) for row in chosen)
            for what in WHAT
        )
        prompts = tuple(about.prompts[row] for row in chosen)
        return Attention(prompts, steps, queries, keys, values, scaling=about.scaling)

    def numbers(self, row: int, layer: int, what: str, stop: int) -> Array:
        """[heads, stop, D] float32 of one tensor: its first ``stop`` tokens."""
        with safe_open(str(self.path), framework="numpy") as file:
            stored = file.get_slice(name_of(row, layer, what))[:stop]
        return np.ascontiguousarray(floats(stored, self.about.dtype).swapaxes(0, 1))

    def _exist(self, name: str, asked: Places, known: range | Places) -> None:
        missing = [number for number in asked if number not in known]
        if missing:
            recorded = f"recorded were {name} {spelled(list(known))}"
            raise Complaint(f"{name} {spelled(missing)} are not in this trace", recorded, (name,))

    def _check(self, slices: Mapping[str, Any]) -> None:
        """Every tensor is there, of the shape and type that the metadata say."""
        about = self.about
        if about.dtype not in STORED or not about.layers or not about.prompts:
            raise Complaint(f"`{self.path}` is a damaged trace: its metadata make no sense", "record it anew")
        for row in range(len(about.prompts)):
            for name, what in ((name_of(row, layer, what), what) for layer in about.layers for what in WHAT):
                found = slices.get(name)
                expected = [*about.shape(row, what)], STORED[about.dtype][0]
                if found is None or (found.get_shape(), found.get_dtype()) != expected:
                    raise Complaint(f"`{self.path}` is a damaged trace: {name} is not as announced", "record it anew")


class Layers:
    """[L, heads, T, D] of a trace, in place of an array: a layer is read when it is first asked for, and kept."""

    dtype = np.dtype(np.float32)
    ndim = 4

    def __init__(self, trace: Trace, row: int, layers: Places, what: str, steps: int) -> None:
        self.trace, self.row, self.layers, self.what = trace, row, layers, what
        _, heads, size = trace.about.shape(row, what)
        self.shape = len(layers), heads, trace.about.prompts[row] + steps, size
        self.read: dict[int, Array] = {}

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Array]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Array:
        if not isinstance(index, int | np.integer):
            return cast(Array, np.asarray(self)[index])
        place = range(len(self.layers))[index]
        if place not in self.read:
            self.read[place] = self.trace.numbers(self.row, self.layers[place], self.what, self.shape[2])
        return self.read[place]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.stack(list(self)).astype(dtype or self.dtype, copy=False)


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Complaint(f"`{shown(value)}` is no path", "as in `trace: recorded.safetensors`")
    return value
