"""What the tests of policies share: the shipped files, and short ways to run one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpolicy.language import Policy
from kvpolicy.testing.feeding import OracleAlone, RuntimeBeside, plan_for, watch
from kvpolicy.testing.patterns import synthesize
from kvpolicy.testing.seen import Seen

FILES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "policies").glob("*.yaml"))}
"""Name -> file of every shipped policy."""

Kept = dict[tuple[int, int, int, int], frozenset[int]]


def run(policy: Policy, *, runtime: bool = False, **attention: Any) -> Iterator[Seen]:
    """Every layer, row and KV head after every pass of a policy under synthetic attention."""
    said = synthesize(attention)
    plan = plan_for(policy, said)
    return watch(RuntimeBeside(plan) if runtime else OracleAlone(plan), said)


def kept(policy: Policy, **attention: Any) -> Kept:
    """(layer, row, KV head, newest position) -> positions that the runtime keeps, which the oracle has confirmed."""
    return {(*seen.place, seen.newest): seen.kept() for seen in run(policy, runtime=True, **attention)}
