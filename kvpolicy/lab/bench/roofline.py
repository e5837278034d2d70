"""The least a step must read, and how fast this machine reads: together, the shortest time that a step can take."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from kvpolicy.lab.bench.timing import timed
from kvpolicy.plan import DTYPE_BYTES, ModelGeometry, Plan


def slot_bytes(plan: Plan) -> int:
    """Keys and values of all slots: what attention over a policy's cache reads, empty slots included."""
    return sum(buffer.bytes for layer in plan.layers for buffer in layer.buffers if buffer.holds_tokens)


def token_bytes(shape: ModelGeometry) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * DTYPE_BYTES[shape.dtype]


def weight_bytes(model: Any) -> int:
    """Weights that a step reads once: all but an input embedding that is not also the output layer."""
    parameters = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    given, taken = model.get_input_embeddings(), model.get_output_embeddings()
    if taken is None or taken.weight is not given.weight:
        parameters.pop(id(given.weight), None)
    return sum(parameters.values())


def copy_bandwidth(device: torch.device, size: int | None = None, repeats: int = 7) -> float:
    """Bytes a second that a large copy moves, read and written both counted; the median of some copies."""
    size = size or (2**30 if device.type == "cuda" else 2**27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(repeats + 1)][1:]
    return 2 * size / statistics.median(seconds)


def share(step_bytes: float, seconds: float, bandwidth: float) -> float:
    """What part of the bandwidth a step uses: 1 where it takes no longer than reading its bytes."""
    return step_bytes / seconds / bandwidth
