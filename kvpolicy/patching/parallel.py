"""What tensor parallelism made of a model: which of its KV heads are computed on this rank, and who has the others.

transformers shards a model's projections over the ranks of a mesh, so that attention sees the heads of one rank, as
plain tensors. Where a family's plan gathers the projections' outputs again (OLMo 2 and others), each rank sees all
heads, and so does each cache.
"""

from __future__ import annotations

from typing import Any

from kvpolicy.architecture import Architecture
from kvpolicy.errors import ModelError
from kvpolicy.plan import ModelGeometry, uneven
from kvpolicy.runtime.ranks import ALONE, Ranks

KEYS = ("k_proj", "qkv_proj", "query_key_value")
"""What families call the projection that keys come from, alone or fused with others."""


def ranks_of(model: Any, architecture: Architecture, geometry: ModelGeometry) -> Ranks:
    """The ranks that share a model's KV heads; ``ALONE`` where this process sees all of them.

    Raises:
        ModelError: the heads do not divide by the ranks, or the model is split by layers.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return ALONE
    if "pp" in (mesh.mesh_dim_names or ()) and mesh["pp"].size() > 1:
        raise ModelError(
            "this model's layers are spread over ranks (pipeline parallelism), and a policy's cache has all layers on "
            "one; shard it by heads: tp_plan='auto'"
        )
    if (getattr(model, "_tp_size", None) or 1) < 2 or not _shards_keys(model, architecture):
        return ALONE
    if mesh.ndim > 1:
        mesh = mesh["tp"]
    if geometry.kv_heads % mesh.size():
        raise ModelError(uneven(geometry, mesh.size()))
    return Ranks.of(mesh.get_group())


def _shards_keys(model: Any, architecture: Architecture) -> bool:
    """Whether attention is given the keys of this rank's heads alone."""
    for name, style in (getattr(model, "_tp_plan", None) or {}).items():
        parent, _, module = name.rpartition(".")
        inside = parent.endswith(f"{architecture.layers}.*.{architecture.attention}")
        if module in KEYS and inside and "colwise" in style:
            return "gather" not in style and "rep" not in style
    return False
