"""GGUF files as plain transformers models: every weight unpacked, an ordinary `nn.Linear` around it.

transformers leaves the weights of a GGUF packed unless told otherwise, which on a CPU is five times slower.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from kvpolicy.errors import MissingExtra
from kvpolicy.models.quiet import quiet

NEEDED = ("gguf", "accelerate")


def require_gguf(what: str) -> None:
    """Check for the packages that transformers reads GGUF files with.

    Raises:
        MissingExtra: one is not installed.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"{what} needs {' and '.join(missing)} to read GGUF weights; `pip install 'kvpolicy[gguf]'` brings them"
        )


def read_gguf(file: Path, dtype: Any) -> tuple[Any, Any]:
    """The model and the tokenizer in a GGUF file, in `dtype` (a torch.dtype)."""
    import transformers
    from transformers.utils.logging import is_progress_bar_enabled

    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), **options)
    unpack = getattr(transformers, "GgufConfig", None)  # where it is missing, weights are always unpacked
    if unpack is not None:
        options["quantization_config"] = unpack(dequantize=True)
    # The bar of the conversion does not heed the setting that all others heed.
    silence: AbstractContextManager[Any] = nullcontext() if is_progress_bar_enabled() else redirect_stderr(StringIO())
    with silence:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=dtype, **options)
    return model, tokenizer


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file as a folder that transformers loads: float32 safetensors, config and tokenizer."""
    import torch

    with quiet():
        model, tokenizer = read_gguf(file, torch.float32)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
