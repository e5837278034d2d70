"""What a plan must know of a model: its shape, read from the config alone, no weights and no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvpolicy.errors import ModelError
from kvpolicy.plan.layer_kinds import LocalLayer, local_layers, state_layers

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}


@dataclass(frozen=True)
class ModelGeometry:
    """Shape of a decoder: Q query heads over K KV heads of size D in each of its layers.

    ``layers`` are those that attend to the whole text, which a policy governs; ``local`` those that attend to
    the text nearby, ``states`` those that keep a state of fixed size in place of tokens.
    ``softcap`` bounds scaled logits, and ``sinks`` take part in the softmax (``attention.Formula`` says how).
    ``dtype`` is the name of the floating type that keys and values are stored in ("float32", "bfloat16", "float16").
    """

    model_type: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    vocab_size: int = 0
    max_positions: int = 0
    local: tuple[LocalLayer, ...] = ()
    states: tuple[int, ...] = ()
    softcap: float | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "query_heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ModelError(f"{self.model_type}: {name} is {getattr(self, name)}; a decoder needs at least 1")
        if self.query_heads % self.kv_heads:
            raise ModelError(
                f"{self.model_type}: {self.query_heads} query heads cannot share {self.kv_heads} KV heads evenly"
            )

    @property
    def group(self) -> int:
        """G: query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def depth(self) -> int:
        """All decoder layers."""
        return self.layers + len(self.local) + len(self.states)

    @property
    def governed(self) -> tuple[int, ...]:
        """The model's own numbers of the layers that a policy governs, which numbers them from 0."""
        others = {layer.index for layer in self.local} | set(self.states)
        return tuple(index for index in range(self.depth) if index not in others)

    def of_heads(self, kv_heads: int) -> ModelGeometry:
        """The same with so many KV heads, and the query heads that share them."""
        return replace(self, kv_heads=kv_heads, query_heads=kv_heads * self.group)

    @classmethod
    def from_config(cls, config: Any, dtype: str | None = None) -> ModelGeometry:
        """Read the shape out of a transformers config object or the mapping of a ``config.json``.

        Where a config is of a model that sees as well, the shape is its ``text_config``'s. ``dtype`` overrides the one
        the config names (float32 where it names none).
        """
        read = _reader(config)
        model_type = str(read("model_type") or "unknown")
        named = dtype or read("dtype") or read("torch_dtype")
        if not read("num_hidden_layers") and read("text_config"):
            read = _reader(read("text_config"))
        layers, query_heads, hidden = read("num_hidden_layers"), read("num_attention_heads"), read("hidden_size")
        if not layers or not query_heads or not hidden:
            raise ModelError(
                f"the config of this {model_type} model lacks num_hidden_layers, num_attention_heads or hidden_size, "
                "so its cache cannot be planned; pass the config of its text decoder"
            )
        stored = str(named or read("dtype") or read("torch_dtype") or "float32").removeprefix("torch.")
        if stored not in ("float32", "bfloat16", "float16", "float64"):
            raise ModelError(f"keys and values cannot be stored as {stored}; pass dtype float32, bfloat16 or float16")
        local, states = (find(read, int(layers), model_type) for find in (local_layers, state_layers))
        return cls(
            model_type=model_type,
            layers=int(layers) - len(local) - len(states),
            query_heads=int(query_heads),
            kv_heads=int(read("num_key_value_heads") or query_heads),
            head_dim=int(read("head_dim") or hidden // query_heads),
            dtype=stored,
            vocab_size=int(read("vocab_size") or 0),
            max_positions=int(read("max_position_embeddings") or 0),
            local=local,
            states=states,
            softcap=read("attn_logit_softcapping"),
        )


def _reader(config: Any) -> Callable[[str], Any]:
    """Reads a key of a config object or of a mapping; None where it is not there."""
    return config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
