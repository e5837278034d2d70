"""The arms of experiments: shipped policies, and variants that only a comparison needs, fitted to short texts."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from kvpolicy.lab.compare.arms import FULL, Arm, works
from kvpolicy.lab.suites.base import Lab
from kvpolicy.language import Policy, load_policy, shipped_policies
from kvpolicy.plan import make_plan

QUARTER = ("window", "buffer")
"""Params of policies with a ``budget`` that say how many tokens wait or choose. Published for budgets of a thousand,
they are cut to a quarter of the smallest budget."""

FIXED = ("sinks",)
"""Params that stay as published where all sizes of a policy are scaled to its budget."""

VARIANT = ", "
"""Between a series and what sets one of its arms apart, in a label."""


def full() -> Arm:
    """The full cache."""
    return Arm(FULL, load_policy(FULL), None, control=True)


@cache
def policy_named(name: str) -> Policy:
    """A shipped policy, or one of those beside this file."""
    if name in shipped_policies():
        return load_policy(name)
    return load_policy(str(files("kvpolicy.lab.suites") / "policies" / f"{name}.yaml"))


def arm(lab: Lab, name: str, budget: int | None, label: str = "", /, **given: object) -> Arm:
    """A policy at a budget, its params fitted to this text but for those that are given."""
    policy = policy_named(name)
    return Arm(label or name, policy, budget, fitted(lab, policy) | {key: str(value) for key, value in given.items()})


def fitted(lab: Lab, policy: Policy) -> dict[str, str]:
    """Settings under which a policy that was published for long texts makes sense in this one."""
    found: dict[str, str] = {}
    for name, param in policy.params.items():
        value = param.value.constant
        if value is None:
            continue
        if name == "page_size":
            found[name] = str(lab.page)
        elif name in FIXED:
            found[name] = str(int(value))
        elif name in QUARTER and "budget" in policy.params:
            found[name] = str(min(int(value), max(1, lab.budgets[0] // 4)))
    return found


def quest(lab: Lab) -> str:
    """Quest, or what stands for it in a model of so few layers that its published form leaves all of them whole."""
    plan = make_plan(load_policy("quest"), lab.geometry, prompt=lab.prompt, max_new_tokens=lab.new)
    return "quest" if works(plan) else "quest-all-layers"


def series(label: str) -> str:
    """The series that an arm belongs to."""
    return label.partition(VARIANT)[0]
