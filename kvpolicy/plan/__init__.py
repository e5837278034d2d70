"""Policy + model geometry -> numbers: capacities, bytes, signals, cadence. Imports no torch."""

from kvpolicy.plan.build import make_plan
from kvpolicy.plan.geometry import DTYPE_BYTES, ModelGeometry
from kvpolicy.plan.layer_kinds import LocalLayer
from kvpolicy.plan.sharding import gathered, on_rank, uneven
from kvpolicy.plan.signals import layer_needs, needs, reads_bounds, scoring_leaves
from kvpolicy.plan.structure import (
    Buffer,
    LayerPlan,
    LocalPlan,
    Plan,
    PoolPlan,
    ReadPlan,
    ScorerPlan,
    StorePlan,
    Stream,
)
from kvpolicy.plan.support import check_supported, unsupported

__all__ = [
    "DTYPE_BYTES",
    "Buffer",
    "LayerPlan",
    "LocalLayer",
    "LocalPlan",
    "ModelGeometry",
    "Plan",
    "PoolPlan",
    "ReadPlan",
    "ScorerPlan",
    "StorePlan",
    "Stream",
    "check_supported",
    "gathered",
    "layer_needs",
    "make_plan",
    "needs",
    "on_rank",
    "reads_bounds",
    "scoring_leaves",
    "uneven",
    "unsupported",
]
