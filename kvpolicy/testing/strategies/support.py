"""What the runtime runs: asked of the plan itself (``plan.support``), with a small policy for each thing to say."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import yaml

from kvpolicy.errors import KvpolicyError
from kvpolicy.language import Policy, loads_policy
from kvpolicy.plan import ModelGeometry, Plan, make_plan, unsupported

SMALL = ModelGeometry("probe", layers=2, query_heads=2, kv_heads=2, head_dim=4)


def written(document: dict[str, Any]) -> str:
    """A document as YAML."""
    return str(yaml.safe_dump(document, sort_keys=False, width=110, allow_unicode=True))


def probe(pool: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A policy of one pool that says one thing more."""
    answers = {"admit": "all", "budget": 8, **(pool or {})}
    return {"kvpolicy": 1, "name": "probe", "pools": {"all": answers}, **top}


def runs(document: dict[str, Any]) -> bool:
    """Whether the runtime would take a policy."""
    return _runs(json.dumps(document))


@lru_cache(maxsize=1024)
def _runs(document: str) -> bool:
    policy = loads_policy(written(json.loads(document)), "probe")
    return not any(unsupported(make_plan(policy, SMALL, prompt=(2, 8), max_new_tokens=8)))


def refused(policy: Policy) -> bool:
    """Whether no plan of a loaded policy runs: the runtime does not know it, or there is no plan at all."""
    try:
        plan: Plan = make_plan(policy, SMALL, prompt=(0, 24), max_new_tokens=24)
    except KvpolicyError:
        return False  # lengths that its total or its pages refuse: those of the text decide
    return any(unsupported(plan))
