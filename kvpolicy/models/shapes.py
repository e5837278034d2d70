"""Shapes of published models by name, and what any model's config says of its shape. No weights, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvpolicy.errors import ModelError
from kvpolicy.language.vocabulary import nearest
from kvpolicy.models.builtin import find_builtin
from kvpolicy.models.load import load_config
from kvpolicy.plan import ModelGeometry


def _published(
    model_type: str, layers: int, heads: tuple[int, int], inner: int, vocabulary: int, positions: int
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 128,
        "hidden_size": 128 * heads[0],
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


SHAPES = {  # what each model's config.json says; heads are of size 128 in all of them but the last
    "llama-3.1-8b": _published("llama", 32, (32, 8), 14_336, 128_256, 131_072),
    "llama-3.1-70b": _published("llama", 80, (64, 8), 28_672, 128_256, 131_072),
    "mistral-7b-v0.3": _published("mistral", 32, (32, 8), 14_336, 32_768, 32_768),
    "marco-o1": _published("qwen2", 28, (28, 4), 18_944, 152_064, 32_768),
    "qwen2.5-math-7b": _published("qwen2", 28, (28, 4), 18_944, 152_064, 4_096),
    "deepscaler-1.5b": _published("qwen2", 28, (12, 2), 8_960, 151_936, 131_072),
    "qwen3-8b": _published("qwen3", 36, (32, 8), 12_288, 151_936, 40_960),
    "smollm2-135m": json.loads(find_builtin("builtin:smollm2").config.read_text(encoding="utf-8")),
}


def config_named(name: str) -> dict[str, Any]:
    """The config of a published model, as the mapping of its ``config.json``.

    Raises:
        ModelError: there is none of this name.
    """
    if name not in SHAPES:
        raise ModelError(f"there is no shape {name!r}; {nearest(name, SHAPES).replace('`', '')}")
    return dict(SHAPES[name])


def shape_named(name: str, dtype: str | None) -> ModelGeometry:
    """The shape of a published model, in its own dtype or in `dtype`.

    Raises:
        ModelError: there is none of this name, or no cache is stored in this dtype.
    """
    return ModelGeometry.from_config(config_named(name), dtype)


def shape_of(model: str, dtype: str | None) -> ModelGeometry:
    """The shape of a model: a built-in one, a folder, a config.json, a hub id or a .gguf file. Reads no weights.

    Raises:
        ModelError: there is no such model, or its config cannot be read.
    """
    file = Path(model).expanduser()
    if file.is_dir() and (file / "config.json").is_file():
        file = file / "config.json"
    if not file.is_file() or file.suffix != ".json":
        return ModelGeometry.from_config(load_config(model), dtype)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the config {file}: {error}; give the config.json of a model") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} is no config: it holds a {type(config).__name__}; give the config.json of a model")
    return ModelGeometry.from_config(_with_kinds(config), dtype)


def _with_kinds(config: dict[str, Any]) -> Any:
    """A config as transformers completes it, where it has a sliding window and does not say for which layers: older
    files leave that to the family's own rule."""
    text = config.get("text_config", config)
    if not text.get("sliding_window") or "layer_types" in text or "model_type" not in config:
        return config
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**config)
    except (ValueError, TypeError):  # a family that this transformers does not know
        return config
