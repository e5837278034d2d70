"""The attention function that kvpolicy registers with transformers, and what it makes of attention masks.

It goes by the name `kvp|<what the model used before>`, so one look at a config tells that it is patched and what runs
for caches that are not ours. A registration changes nothing by itself and is shared by every patched model: it stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from kvpolicy.attention import Formula
from kvpolicy.attention.backends import TRITON
from kvpolicy.errors import CacheError, ModelError

PREFIX = "kvp|"


def register(previous: str, prefix: str = PREFIX, function: Callable[..., Any] | None = None) -> str:
    """Register a function (by default ours) over an attention implementation, once per process, and return its name.

    Other caches keep the masks they had: without a mask function of its own name, transformers would make none, and
    padding would be attended to.
    """
    name = f"{prefix}{previous}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, function or partial(attend, previous))
        if previous in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[previous])
    return name


def attend(
    previous: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    kv_layer: Any = None,
    kv_temperature: Callable[[nn.Module, Tensor], Tensor | None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend through a policy's cache layer where the decoder layer was handed one, else exactly as before.

    Shapes: query [B, Q, N, D], key and value [B, K, N, D]; returns the output [B, N, Q, D] and no weights. Which of the
    N tokens are padding was told to the cache when the pass was opened.

    Raises:
        ModelError: the layer looks back over another number of tokens than its config said when the cache was planned.
    """
    if kv_layer is None:
        return fallback(previous, module)(module, query, key, value, attention_mask, *args, **kwargs)
    if key.shape[1] != kv_layer.heads:
        raise ModelError(
            f"attention was given {key.shape[1]} KV heads, and the cache was made for {kv_layer.heads}: the model is "
            "sharded in a way that kvpolicy does not know; shard it with transformers' tp_plan='auto', or load it whole"
        )
    if kwargs.get("dropout"):
        raise ModelError(
            f"this model is in training mode and drops attention at random (dropout {kwargs['dropout']}), which no "
            "policy's cache does; call model.eval()"
        )
    window = kwargs.get("sliding_window") or None
    if window != kv_layer.window:
        raise ModelError(
            f"{type(module).__name__} attends through a window of {window or 'all'} tokens, and its cache was planned "
            f"for {kv_layer.window or 'all'}: the model's config does not tell what its layers do; call "
            "kvpolicy.remove(model), and report the model type"
        )
    if kv_temperature is not None:
        scale = kv_temperature(module, kv_layer.query_position)
        query = query if scale is None else query * scale[:, None, :, None]
    formula = Formula(kwargs["scaling"], kwargs.get("softcap"), kwargs.get("s_aux"))
    if kv_layer.backend == TRITON and not formula.plain:
        raise ModelError(
            f"{type(module).__name__} caps its logits or has attention sinks, and the triton kernels compute plain "
            "softmax; call kvpolicy.remove(model), and apply the policy with backend='torch'"
        )
    # Under autocast, and beside layers kept in float32, these may come in other dtypes than the cache has.
    given = value.dtype
    query, key, value = (tensor.to(kv_layer.dtype) for tensor in (query, key, value))
    return kv_layer.forward(query, key, value, formula).to(given), None


def newest_validity(attention_mask: Any, columns: int) -> Tensor | None:
    """Validity [B, N] of a pass's N new columns out of whatever mask the model was called with; None: all valid.

    Raises:
        CacheError: a mask of another kind; policies take padding masks only.
    """
    if isinstance(attention_mask, dict):  # prepared per layer type, as `generate` does for some models
        attention_mask = attention_mask.get("full_attention")
    if attention_mask is None:
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] >= columns:
        return attention_mask[:, -columns:].bool()
    if isinstance(attention_mask, Tensor) and attention_mask.shape[1:] == (1, 1, columns):
        return attention_mask[:, 0, 0, :].bool()
    shape = tuple(getattr(attention_mask, "shape", ())) or type(attention_mask).__name__
    raise CacheError(
        f"a policy's cache takes a 2-D padding mask [rows, columns] that covers the {columns} new columns, not {shape}"
    )


def fallback(previous: str, module: nn.Module) -> Callable[..., Any]:
    """What the model would have called: the registered function, or its own module's for `eager`."""
    if previous in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[previous]
    for parent in type(module).__mro__:
        eager = getattr(sys.modules[parent.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise ModelError(f"{type(module).__name__} has no '{previous}' attention to fall back to; kvpolicy.remove(model)")
