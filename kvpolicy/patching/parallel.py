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
        ModelError: the heads do not divide by the ranks, or the model is split in another way than by heads.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return ALONE
    if "pp" in (mesh.mesh_dim_names or ()) and mesh["pp"].size() > 1:
        raise ModelError(
            "this model's layers are spread over ranks (pipeline parallelism), and a policy's cache has all layers on "
            "one; shard it by heads: tp_plan='auto'"
        )
    if (getattr(model, "_tp_size", None) or 1) < 2 or not _shares_heads(model, architecture):
        return ALONE
    if mesh.ndim > 1:
        mesh = mesh["tp"]
    if geometry.kv_heads % mesh.size():
        raise ModelError(uneven(geometry, mesh.size()))
    return Ranks.of(mesh.get_group())


def _shares_heads(model: Any, architecture: Architecture) -> bool:
    """Whether attention is given the queries and keys of this rank's heads alone.

    Raises:
        ModelError: of the queries alone, as where keys are one latent vector for all heads.
    """
    plan, where = getattr(model, "_tp_plan", None) or {}, f"{architecture.layers}.*.{architecture.attention}."
    sliced = {name.rpartition(".")[2] for name, style in plan.items() if where in name and _slices(style)}
    if sliced and sliced.isdisjoint(KEYS):
        shared = ", ".join(sorted(sliced))
        raise ModelError(
            f"tensor parallelism shares out {shared} of this {model.config.model_type} model but not its keys, so each "
            "rank would choose by its own queries alone; load it without tp_plan"
        )
    return bool(sliced)


def _slices(style: str) -> bool:
    """Whether a style of a plan leaves each rank its part of the outputs, as some older ones (`colwise_rep`) do not."""
    return "colwise" in style and "gather" not in style and "rep" not in style
