"""What there is to say of a policy without running it: its paper, pools, laws, signals and backends, from its plan."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from kvpolicy.language import Policy, load_policy
from kvpolicy.language.library import fetch
from kvpolicy.plan import Plan, layer_needs, make_plan, needs, scoring_leaves, unsupported
from kvpolicy.plan.laws import LONG, TYPICAL, Law, Part, laws, least_shape
from kvpolicy.plan.structure import PoolPlan

NOTATION = "P prompt tokens, N generated tokens, B what the params bound"
FEW = 3
"""Laws of layers that are told one by one."""

PROMPT, NEW = (100, 900), 4096
"""Lengths at which plans are asked about signals and backends: those do not depend on lengths but for refusals."""


@dataclass(frozen=True)
class Header:
    """The comment that a policy's file begins with: the method in a sentence or two, and where the policy departs."""

    idea: str
    departures: tuple[str, ...]


@cache
def plan_of(name: str) -> Plan:
    """A shipped policy's plan for a model of the usual shape, with as many layers and KV heads as may differ."""
    policy = load_policy(name)
    return make_plan(policy, least_shape(policy, TYPICAL), prompt=PROMPT, max_new_tokens=NEW)


@cache
def parts_of(name: str) -> list[Part]:
    """A shipped policy's laws, those of most layers first."""
    return laws(load_policy(name))


def facts(name: str) -> dict[str, Any]:
    """Everything about a shipped policy that needs no torch, as plain data."""
    policy = load_policy(name)
    return {
        "name": policy.name,
        "summary": policy.summary,
        "params": {param: str(value.default) for param, value in policy.params.items()},
        "cite": list(policy.cite),
        "tests": len(policy.tests),
        "pools": pools(name),
        "memory": law_words(name, "memory"),
        "time": law_words(name, "time"),
        "laws": [law_numbers(part) for part in parts_of(name)],
        "signals": signals(plan_of(name)),
    }


def pools(name: str) -> list[dict[str, Any]]:
    """The pools of most layers: who enters, in pages of how many, how many may stay, and what the plan makes of it."""
    policy, part = load_policy(name), parts_of(name)[0]
    layers = [layer for layer in plan_of(name).layers if {pool.name for pool in layer.pools} == set(part.pools)]
    pools = layers[-1].pools if layers else ()
    return [
        {
            "name": pool.name,
            "admits": sorted(pool.admits),
            "page": pool.page,
            "budget": _budget(policy, pool),
            "memory": str(part.pools[pool.name]),
            "reads": "all" if pool.read is None else f"the best {pool.read.top.text} tokens",
            "bits": pool.store.bits if pool.store else None,
        }
        for pool in pools
    ]


def _budget(policy: Policy, pool: PoolPlan) -> str | None:
    """As the policy writes it, params put in; as the plan has it where an override gives it."""
    said = policy.pools[pool.name].budget if pool.name in policy.pools else pool.budget
    return None if said is None or pool.budget is None else said.text


def law_words(name: str, what: str) -> str:
    """`O(B)`, or with its layers apart: `O(P + N); layers 0..1: O(B)`; of many, the most and the least."""
    parts = parts_of(name)
    said = [(part.where, str(part) if what == "memory" else str(part.time)) for part in parts]
    if len({law for _, law in said}) == 1:
        return said[0][1]
    if len(said) > FEW:
        by_size = sorted(parts, key=lambda part: getattr(part, what).at(LONG, LONG))
        return f"{getattr(by_size[-1], what)}, by layer down to {getattr(by_size[0], what)}"
    first, *others = said
    return "; ".join([first[1], *(f"{where}: {law}" for where, law in others)])


def law_numbers(part: Part) -> dict[str, Any]:
    """A part's laws as numbers: tokens per prompt token, per generated token, per the lesser of both, and for ever."""

    def numbers(law: Law) -> dict[str, Any]:
        shares = {"prompt": law.prompt, "generated": law.generated, "both": law.both}
        return {"law": str(law)} | {key: float(value) for key, value in shares.items()} | {"constant": law.constant}

    return {"where": part.where or "all layers", "memory": numbers(part.memory), "time": numbers(part.time)}


def signals(plan: Plan) -> list[dict[str, Any]]:
    """What decides who stays and what is read: signals by name, and what each reads."""
    found: dict[str, list[str]] = {}
    for layer in plan.layers:
        for pools in {layer.pools, *(layer.heads or ())}:
            for pool in pools:
                chosen = [*scoring_leaves(pool), *(pool.read.scorer.leaves() if pool.read else ())]
                found.update({leaf.signal: sorted(needs(leaf.signal)) for leaf in chosen})
        assert layer.heads is not None or layer_needs(layer) <= {need for reads in found.values() for need in reads}
    return [{"name": name, "reads": reads} for name, reads in sorted(found.items())]


def backends(name: str) -> dict[str, Any]:
    """Where it runs: on each backend "yes", or why not or not wholly. Imports torch."""
    from kvpolicy.runtime.fused import Fusion

    plan = plan_of(name)
    refused = list(dict.fromkeys(unsupported(plan)))
    if refused:
        return dict.fromkeys(("torch", "triton"), f"no: {'; '.join(refused)}")
    told = (Fusion.of(layer, plan.geometry) for layer in plan.layers)
    reasons = list(dict.fromkeys(fusion for fusion in told if isinstance(fusion, str)))
    return {"torch": "yes", "triton": f"attention only: {'; '.join(reasons)}" if reasons else "yes, in two launches"}


# Headers -------------------------------------------------------------------------------------------------------------

DEPARTS = re.compile(r"(?i)\b(?:departs|departures?|deviates)\b.*?:\s+")
SENTENCE = re.compile(r"(?<=[.:;)])\s+(?=[A-Z])")


def header(name: str) -> Header:
    """The comment at the top of a shipped policy's file, its idea (the first paragraph) apart from its departures."""
    text, _ = fetch(name)
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    first = " ".join("\n".join(lines).partition("\n\n")[0].partition("\n  - ")[0].split())
    idea = itertools.takewhile(lambda sentence: not DEPARTS.search(f"{sentence} "), SENTENCE.split(first))
    return Header(" ".join(idea), tuple(_departures(lines)))


def _departures(lines: list[str]) -> list[str]:
    """The items of the list of departures, each as one line; without a list, what follows the word."""
    items: list[str] = []
    for line in lines:
        if line.startswith("  - "):
            items.append(line.strip().removeprefix("- "))
        elif items and line.startswith("   "):
            items[-1] += f" {line.strip()}"
    if items:
        return items
    joined = " ".join(" ".join(lines).split())
    said = DEPARTS.search(joined)
    return [joined[said.end() :]] if said else []
