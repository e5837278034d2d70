"""Who computes attention over slots: ``torch``, which runs everywhere, or ``triton``, which runs on NVIDIA GPUs."""

from __future__ import annotations

import torch

from kvpolicy.attention.kernels import available
from kvpolicy.errors import UsageError
from kvpolicy.plan import ModelGeometry

TORCH, TRITON, AUTO = "torch", "triton", "auto"
BACKENDS = (AUTO, TORCH, TRITON)

TRITON_DTYPES = ("float32", "bfloat16", "float16")
TRITON_HEAD_DIM = 256
TRITON_GROUP = 64


def choose_backend(
    wanted: str, device: torch.device | str, geometry: ModelGeometry, devices: int = 1
) -> tuple[str, str]:
    """The backend for a cache, and why.

    Args:
        wanted: "torch", "triton", or "auto": triton on a GPU where it can run and suits the model's shape, else torch.
        device: where the first layer lies. devices: on how many all layers lie.

    Raises:
        UsageError: no such backend, or triton was asked for where it cannot run.
    """
    if wanted not in BACKENDS:
        raise UsageError(f"there is no backend {wanted!r}; it is one of {', '.join(BACKENDS)}")
    if wanted == TORCH:
        return TORCH, "asked for"
    reason = available(device) or _unsuited(geometry)
    if devices > 1:  # a kernel starts on the device that is current, and not on its tensors'
        reason = f"the layers lie on {devices} devices"
    if wanted == TRITON:
        if reason is not None:
            raise UsageError(f"backend triton cannot run here: {reason}; choose backend auto or torch")
        return TRITON, "asked for"
    if torch.device(device).type != "cuda":
        return TORCH, f"the device is {torch.device(device).type}, not cuda"
    return (TRITON, "the device is cuda") if reason is None else (TORCH, reason)


def _unsuited(geometry: ModelGeometry) -> str | None:
    """What of a model's shape the kernels were not written for."""
    if geometry.dtype not in TRITON_DTYPES:
        return f"the kernels take {', '.join(TRITON_DTYPES)}, not {geometry.dtype}"
    if geometry.head_dim > TRITON_HEAD_DIM:
        return f"the kernels take heads of at most {TRITON_HEAD_DIM} numbers, and these have {geometry.head_dim}"
    if geometry.group > TRITON_GROUP:
        return f"the kernels take at most {TRITON_GROUP} query heads for a KV head, and there are {geometry.group}"
    if geometry.softcap is not None or geometry.sinks:
        return "the kernels compute plain softmax, and this model caps its logits or has attention sinks"
    return None
