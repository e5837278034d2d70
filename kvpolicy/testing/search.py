"""One case of the search for counter-examples: a policy and a text, through the runtime with the oracle beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import yaml

from kvpolicy.errors import KvpolicyError, UsageError
from kvpolicy.language import loads_policy
from kvpolicy.plan import Plan, unsupported
from kvpolicy.testing.feeding import Feed, OracleAlone, RuntimeBeside, passes, plan_for
from kvpolicy.testing.patterns import Attention, synthesize


@dataclass(frozen=True)
class Agreed:
    """A case in which runtime and oracle kept the same tokens at every step.

    ``compared`` kept sets (row x layer x KV head x pass), ``evicted`` tokens, and the ``near_ties`` that float32 cannot
    tell apart, in words. Where the case was refused (politely), ``refused`` says why and nothing was compared.
    """

    compared: int = 0
    evicted: int = 0
    near_ties: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


FREQUENCIES = (1.0, 0.1, 0.01)
"""Of keys that turn, so that where they are turned from and to shows."""


class Overrun(AssertionError):
    """A pool holds more than its plan says it ever will."""


def agree(policy: str, text: Mapping[str, Any], *, compiled: bool = False) -> Agreed:
    """Feed a text (the `attention:` of a test) to runtime and oracle.

    Raises:
        Disagreement: the first difference. Any other exception is a counter-example as well: what a plan accepts runs.
    """
    loaded, said = loads_policy(policy, "case.yaml"), synthesize(text)
    try:
        plan = plan_for(loaded, said)
    except UsageError as error:
        return Agreed(refused=(str(error).split(";")[0].split(",")[0],))
    except KvpolicyError as error:
        return Agreed(refused=(str(error).splitlines()[0].split(": ", 1)[-1],))
    missing = tuple(dict.fromkeys(reason.split(": ", 1)[-1] for reason in unsupported(plan)))
    if missing:
        hear(OracleAlone(plan), said)
        return Agreed(refused=missing)
    feed = RuntimeBeside(plan, compiled=compiled)
    small: dict[str, Any] = {"MASK_NUMBERS": 1, "TILES_PER_THREAD": {}, "TILES_ELSEWHERE": (1, 16)}
    with patch.multiple("kvpolicy.attention.torch_prompt", **small):  # so that a prompt of 17 tokens takes two tiles
        hear(feed, said)
        if plan.prompt_chunk is not None:  # the runtime cuts the prompt itself, too
            hear(RuntimeBeside(plan), said, whole=True)
        if plan.policy.positions == "compact":
            hear(RuntimeBeside(plan, frequencies=FREQUENCIES[: plan.geometry.head_dim // 2]), said)
    agreement, stats = feed.beside.agreement, feed.beside.cache.stats()
    return Agreed(agreement.compared, stats["evicted"], tuple(str(tie) for tie in agreement.near_ties))


def hear(feed: Feed, said: Attention, whole: bool = False) -> None:
    """A whole text; after every pass no pool may hold more than its plan says.

    ``whole``: prompts come as the text has them, and not in the policy's chunks.
    """
    for now in passes(said, None if whole else feed.plan.prompt_chunk):
        for step in feed.feed(said, now):
            if not now.more:
                check_bounds(feed.plan, step.layer, step.heads)


def check_bounds(plan: Plan, layer: int, heads: Any) -> None:
    """Raise Overrun where whole pages pass the bound that `explain` prints."""
    planned = plan.layers[layer]
    for head, pools in enumerate(heads):
        for pool in planned.pools if planned.heads is None else planned.heads[head]:
            held = len(pools[pool.name].units) * pool.page
            updated = pools[pool.name].choice is not None
            if held > (pool.bound if updated else pool.capacity + plan.prompt[1]):
                raise Overrun(
                    f"layer {layer}, KV head {head}: pool {pool.name} holds {held} tokens, bound {pool.bound}"
                )


def reproduction(policy: str, text: Mapping[str, Any], why: str) -> str:
    """A YAML file that shows a counter-example with `kvpolicy test --runtime FILE`: the policy, and a test that says
    the text again. Its claim holds whatever is kept: what fails is the comparison."""
    document = yaml.safe_load(policy)
    test = {"name": "found by search", "attention": dict(text), "expect": [{"resident": {"min": 0}}]}
    body = yaml.safe_dump({**document, "tests": [test]}, sort_keys=False, width=110, allow_unicode=True)
    return "".join(f"# {line}\n" for line in why.splitlines()) + str(body)
