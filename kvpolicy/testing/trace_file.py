"""Traces on disk: what the attention of a model got while it wrote, as one safetensors file.

Per row r and layer l (the model's own number) there are three tensors, ``rows.r.layers.l.queries`` [T, Q, D],
``….keys`` and ``….values`` [T, K, D], tokens first, so that a file grows token by token and a stretch of a text is a
stretch of the file. Queries and keys are as they were multiplied: normalised and rotated. bfloat16 numbers, which NumPy
does not know, are stored as U16 bit patterns (``tensor.view(torch.bfloat16)`` in torch). The file's metadata are the
fields of ``About``, each as JSON, under "kvpolicy_trace" the version of this layout.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kvpolicy.language.base import Complaint

Array = np.ndarray

VERSION = 1
WHAT = ("queries", "keys", "values")
STORED = {"float32": ("F32", np.float32), "float16": ("F16", np.float16), "bfloat16": ("U16", np.uint16)}
"""dtype of the model -> its name in a safetensors file, and what NumPy reads it as."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a trace is of.

    ``layers`` are the recorded ones of the model's ``model_layers``; ``revision`` is the commit of a hub model,
    ``digest`` that of its config (sha256, 12 digits). A row's text is ``prompts[row]`` tokens, then ``steps`` generated
    ones, which ``token_ids`` and ``tokens`` name.
    """

    model: str
    model_type: str
    model_layers: int
    layers: tuple[int, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    dtype: str
    prompts: tuple[int, ...]
    steps: int
    revision: str = ""
    digest: str = ""
    token_ids: tuple[tuple[int, ...], ...] = ()
    tokens: tuple[tuple[str, ...], ...] = ()

    def lengths(self) -> tuple[int, ...]:
        """Tokens by row."""
        return tuple(prompt + self.steps for prompt in self.prompts)

    def shape(self, row: int, what: str) -> tuple[int, int, int]:
        """Of one tensor: tokens, heads, head size."""
        return self.lengths()[row], self.query_heads if what == "queries" else self.kv_heads, self.head_dim

    def metadata(self) -> dict[str, str]:
        """As a safetensors file carries it."""
        fields = {field.name: json.dumps(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kvpolicy_trace": str(VERSION), **fields}

    @classmethod
    def read(cls, metadata: dict[str, str]) -> About:
        """The same from a file's metadata. Raises Complaint where they are not a trace's, or of a later version."""
        version = metadata.get("kvpolicy_trace", "")
        if not version:
            raise Complaint("it is a safetensors file, but no trace", "`kvpolicy trace` records one")
        if version != str(VERSION):
            raise Complaint(f"it is a trace of version {version}, and this kvpolicy reads {VERSION}", "record it anew")
        try:
            given: dict[str, Any] = {}
            for field in dataclasses.fields(cls):
                value = json.loads(metadata[field.name])
                given[field.name] = _tuples(value) if str(field.type).startswith("tuple") else _kinds[field.type](value)
            return cls(**given)
        except (KeyError, TypeError, ValueError) as error:
            raise Complaint(f"its metadata are damaged ({error})", "record it anew") from None


_kinds: dict[Any, Any] = {"str": str, "int": int, "float": float}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def name_of(row: int, layer: int, what: str) -> str:
    """A tensor's name in the file."""
    return f"rows.{row}.layers.{layer}.{what}"


def bits(array: Array) -> Array:
    """float32 numbers as bfloat16 bit patterns, rounded to nearest, ties to even."""
    whole = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def floats(stored: Array, dtype: str) -> Array:
    """What a file holds, as float32."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(stored, dtype=np.float32)


class TraceWriter:
    """Writes a trace while it is recorded: memory holds only what is appended at once.

    Each tensor grows in a file of its own beside ``path``; ``finish`` joins them under a safetensors header (the
    format's own writers want whole tensors in memory). Used with ``with``: what was begun and not finished vanishes.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self._work = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._work.cleanup()

    def append(self, row: int, layer: int, what: str, array: Array) -> None:
        """The next tokens [t, heads, D] of one tensor, in the type that NumPy stores the writer's dtype as."""
        assert array.dtype == STORED[self.dtype][1], (array.dtype, self.dtype)
        with self._part(name_of(row, layer, what)).open("ab") as part:
            part.write(np.ascontiguousarray(array).data)

    def finish(self, about: About) -> int:
        """Write the file; returns its bytes."""
        kind, numpy_kind = STORED[self.dtype]
        names = [
            (name_of(row, layer, what), about.shape(row, what))
            for row in range(len(about.prompts))
            for layer in about.layers
            for what in WHAT
        ]
        header: dict[str, Any] = {"__metadata__": about.metadata()}
        end = 0
        for name, shape in names:
            size = int(np.prod(shape)) * np.dtype(numpy_kind).itemsize
            written = self._part(name).stat().st_size
            assert written == size, f"{name}: {written} bytes were appended, {size} announced"
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the numbers are aligned
        whole = Path(self._work.name) / "whole"
        with whole.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, _ in names:
                with self._part(name).open("rb") as part:
                    shutil.copyfileobj(part, file, 2**20)
                self._part(name).unlink()
        os.replace(whole, self.path)
        return 8 + len(text) + end

    def _part(self, name: str) -> Path:
        return Path(self._work.name) / name
