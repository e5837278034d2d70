"""One word to a model: `builtin:tiny`, `builtin:smollm2`, a hub id, a local folder, or a `.gguf` file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvpolicy.errors import ModelError, UsageError
from kvpolicy.models.builtin import PREFIX, builtin_names, find_builtin
from kvpolicy.models.gguf import read_gguf, require_gguf
from kvpolicy.models.processes import Processes, processes
from kvpolicy.models.quiet import quiet

Notify = Callable[[str], None]


def load_model(
    spec: str,
    *,
    device: Any = None,
    dtype: Any = None,
    shard: bool = False,
    progress: bool = False,
    notify: Notify = lambda line: None,
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        spec: `builtin:tiny`, `builtin:smollm2`, a hub id, a local folder, or the path of a `.gguf` file.
        device: where to put it (a torch.device or its name); None means the GPU if there is one.
        dtype: a torch.dtype or its name; None means the one its config names (float32 for the built-in models).
        shard: where torchrun started several processes, give each its part of the heads (tensor parallelism, as the
            model's own plan says), on a device of its own.
        progress: whether transformers may draw its progress bars.
        notify: takes one line before anything is fetched or converted (licence, author and size among it).

    Raises:
        ModelError: there is no such model, or it cannot be fetched or read.
        MissingExtra: a `.gguf` file, or the conversion of builtin:smollm2, lacks a package.
        UsageError: dtype or device is not one that torch knows.
    """
    import torch

    here = processes()
    if shard and here.count > 1:
        if device is not None:
            raise UsageError(f"{here.count} processes share this model, each on a device of its own; drop the device")
        return load_sharded(spec, here, _dtype(torch, dtype), progress, notify)
    place = _device(torch, device)
    kind = _dtype(torch, dtype)
    file = gguf_file(spec)
    with _explained(spec), quiet(not progress):
        if file is not None:
            model, tokenizer = read_gguf(file, kind or torch.float32)
        else:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            source = _source(spec, notify)
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=kind or "auto")
        return model.to(place).eval(), tokenizer


def load_sharded(spec: str, here: Processes, dtype: Any, progress: bool, notify: Notify) -> tuple[Any, Any]:
    """A model whose heads and matrices the processes share, and its tokenizer, in each of them.

    transformers shards while it reads safetensors, so that no process ever holds all weights; what is kept otherwise
    (a `.gguf` file) is refused. What must be fetched or converted first is, by one process.

    Raises:
        ModelError: as `load_model`; in all processes alike.
    """
    if gguf_file(spec) is not None:
        raise ModelError(
            f"{spec} cannot be read in parts by {here.count} processes; convert it first: load it with "
            "kvpolicy.models.load_model and call save_pretrained on the model and on the tokenizer"
        )
    source = here.told(lambda: str(_source(spec, notify)))
    with _explained(spec), quiet(not progress):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **sharding())
    return model.eval(), tokenizer


def sharding() -> dict[str, Any]:
    """How `from_pretrained` is asked to shard: earlier releases know `tp_plan` alone, which later ones will drop."""
    import dataclasses

    from transformers.distributed import DistributedConfig

    if any(field.name == "tp_plan" for field in dataclasses.fields(DistributedConfig)):
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    return {"tp_plan": "auto"}


def _source(spec: str, notify: Notify) -> Path | str:
    """What transformers loads: a folder, or the id of a model on the hub."""
    return find_builtin(spec).folder(notify) if spec.startswith(PREFIX) else local_folder(spec) or spec


def load_config(spec: str) -> Any:
    """The config of a model, with its fields as attributes; reads no weights.

    That of a built-in model ships with kvpolicy: it is read without torch, without network, and before the model was
    ever fetched. Any other is a `transformers` config.

    Raises:
        ModelError: there is no such model, or its config cannot be fetched or read.
        MissingExtra: a `.gguf` file, without the package that reads it.
    """
    if spec.startswith(PREFIX):
        return SimpleNamespace(**json.loads(find_builtin(spec).config.read_text(encoding="utf-8")))
    file = gguf_file(spec)
    with _explained(spec), quiet():
        from transformers import AutoConfig

        if file is not None:
            return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        return AutoConfig.from_pretrained(local_folder(spec) or spec)


def gguf_file(spec: str) -> Path | None:
    """The file that `spec` names, if it names a GGUF file.

    Raises:
        ModelError: there is no such file.
        MissingExtra: the packages that read it are not installed.
    """
    if not spec.endswith(".gguf"):
        return None
    file = Path(spec).expanduser()
    if not file.is_file():
        raise ModelError(f"there is no file {spec}; give the path of a .gguf file")
    require_gguf(spec)
    return file.absolute()


def local_folder(spec: str) -> Path | None:
    """The folder that `spec` names; None where it reads as a hub id.

    Raises:
        ModelError: it can only be a folder and there is none, or the folder holds no model.
    """
    if not spec.strip():
        raise ModelError(f"no model was named; give a local folder, a hub id, {builtin_names()}")
    folder = Path(spec).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"the folder {spec} has no config.json; give a folder written by save_pretrained")
        return folder
    if folder.is_file():
        raise ModelError(f"{spec} is a file; give a folder written by save_pretrained, or a .gguf file")
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or "\\" in spec:
        raise ModelError(f"there is no folder {spec!r}; give a local folder, a hub id, {builtin_names()}")
    return None


@contextmanager
def _explained(spec: str) -> Iterator[None]:
    """Turn what transformers raises about an unreadable model into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        here = spec.startswith(PREFIX) or Path(spec).expanduser().exists()
        way_out = "check that its files are whole" if here else "check its name and the connection to the hub"
        raise ModelError(f"cannot load the model {spec}: {reason}; {way_out}, or use builtin:tiny") from error


def _dtype(torch: Any, dtype: Any) -> Any:
    if dtype is None:
        return None
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UsageError(f"{dtype!r} is no floating type; use float32, bfloat16 or float16")
    return kind


def place_of(device: Any = None) -> Any:
    """The torch.device of a name; None means the GPU if there is one.

    Raises:
        UsageError: torch cannot use it.
    """
    import torch

    return _device(torch, device)


def _device(torch: Any, device: Any) -> Any:
    if device is None:
        own = f"cuda:{processes().local}" if processes().count > 1 else "cuda"
        return torch.device(own if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UsageError(
            f"the device {device!r} cannot be used: {reason}; use cpu, or cuda where there is a GPU"
        ) from error
    return place
