"""The check that a signal gets for free: its torch recipe beside its NumPy one, under many settings.

    @pytest.mark.parametrize("setting", settings("key-power"))
    def test_my_signal(setting):
        check_scorer("key-power", setting)

Each setting is a policy whose pools the signal ranks, fed with random and with tied texts, rows of unequal length in a
padded batch among them. After every pass the runtime must have kept what the oracle keeps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kvpolicy.errors import UsageError
from kvpolicy.language import Policy, loads_policy
from kvpolicy.language.signals import clash, definition, signal_names
from kvpolicy.language.vocabulary import nearest
from kvpolicy.testing.agreement import Disagreement
from kvpolicy.testing.feeding import RuntimeBeside, plan_for, watch
from kvpolicy.testing.patterns import synthesize

Stages = Mapping[str, Any]

ANY: dict[str, Stages] = {
    "as it is": {},
    "the highest first": {"weight": -1},
    "smoothed": {"smooth": {"max": 3}},
    "normed": {"norm": "softmax"},
    "summed over time": {"memory": "sum"},
    "fading": {"memory": {"decay": 0.75}},
    "last hit": {"hit": {"top": "50%"}, "memory": "last-hit"},
    "hits of its pool": {"hit": {"top": "30%"}, "over": "pool", "memory": "sum"},
}
"""Stages that every signal can go through."""

LOOKING: dict[str, Stages] = {
    "maximum over heads": {"heads": "max"},
    "sum over heads": {"heads": "sum"},
    "all queries": {"queries": "all"},
}
"""Those of signals that look at queries."""

SOFTMAX: dict[str, Stages] = {
    "logits' maximum": {"heads": {"logits": "max"}},
    "softmax over the pool": {"over": "pool"},
    "softmax over candidates": {"over": "candidates"},
}
"""Those of a softmax."""

POOLS: dict[str, dict[str, dict[str, Any]]] = {
    "one pool": {"all": {"admit": "all", "budget": 9, "window": 2}},
    "prompt and generated": {
        "prompt": {"admit": "prompt", "budget": 8, "update": "prompt-end"},
        "generated": {"admit": "generated", "budget": 6, "update": {"every": 3}},
    },
    "pages": {"all": {"admit": "all", "page": 4, "budget": 16, "evict": {"scope": "layer"}}},
}
"""Pools that are ranked."""

TEXTS: dict[str, dict[str, Any]] = {
    "random": {"pattern": "uniform", "noise": 1.0, "prompt": [7, 15], "steps": 14},
    "tied": {"pattern": "ties", "prompt": [15, 7], "steps": 14},
}


def settings(name: str) -> list[str]:
    """The settings that a signal is checked under: its stages, then its pools. Raises UsageError: no such signal."""
    return [f"{stages}, {pools}" for stages in _stages(name) for pools in POOLS]


def check_scorer(name: str, setting: str | None = None, *, compiled: bool = False, **arguments: object) -> int:
    """Run a signal's torch recipe beside its NumPy one; returns how many tokens left in all.

    Args:
        name: as policies write it.
        setting: one of ``settings(name)``; all of them unless given.
        compiled: the runtime's generated passes are (many seconds for each setting).
        arguments: of the signal, where others than the default ones are wanted.

    Raises:
        Disagreement: the first moment where the runtime kept something else than the oracle.
        UsageError: there is no such signal, it is broken, or has no torch recipe.
    """
    evicted = 0
    for each in settings(name) if setting is None else [setting]:
        for title, text in TEXTS.items():
            try:
                evicted += _run(_policy(name, each, arguments), text, compiled)
            except Disagreement as error:
                raise Disagreement(f"{name}, {each}, {title} text: {error}") from None
    return evicted


def _stages(name: str) -> Iterator[str]:
    if name not in signal_names():
        raise UsageError(f"no signal is named {name!r}; {nearest(name, signal_names())}")
    if clash(name):
        raise UsageError(f"{clash(name)}; choose another")
    known = definition(name)
    yield from ANY
    yield from LOOKING if known.queries else ()
    yield from SOFTMAX if known.softmax else ()


def _policy(name: str, setting: str, arguments: Mapping[str, object]) -> Policy:
    """The policy of a setting."""
    stages, _, pools = setting.rpartition(", ")
    if setting not in settings(name):
        raise UsageError(f"{name} has no setting {setting!r}; settings({name!r}) lists them")
    scorer = {"signal": {name: dict(arguments)} if arguments else name, **{**ANY, **LOOKING, **SOFTMAX}[stages]}
    ranked = {pool: {**answers, "scorer": scorer} for pool, answers in POOLS[pools].items()}
    policy = {"kvpolicy": 1, "name": "check", "pools": ranked}
    return loads_policy(json.dumps(policy), f"<{setting}>")


def _run(policy: Policy, text: Mapping[str, Any], compiled: bool) -> int:
    said = synthesize(text)
    feed = RuntimeBeside(plan_for(policy, said), compiled=compiled)
    seen = list(watch(feed, said))
    return sum(len(pool.evicted) for at in seen for pool in at.step.heads[at.head].values())
