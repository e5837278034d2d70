"""How much memory a policy's cache takes under other params, at the lengths that it is tuned for. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.lab.bench.budgets import minds_layers
from kvpolicy.lab.compare.arms import FULL
from kvpolicy.language import Policy, load_policy
from kvpolicy.plan import ModelGeometry, Plan, make_plan

Settings = dict[str, str]
"""By param, what ``--set`` would say."""

FEW = 2
"""Layers of which a plan is made in a hurry."""


@dataclass(frozen=True)
class Lengths:
    """Of the texts: the (fewest, most) tokens of a prompt, and the most that follow it."""

    prompt: tuple[int, int]
    new_tokens: int

    @property
    def whole(self) -> int:
        """The most tokens that a text may have."""
        return self.prompt[1] + self.new_tokens


@dataclass(frozen=True)
class Sized:
    """A policy with params put in. ``bytes``: of the cache of one row at these lengths; ``idle``: it never evicts."""

    policy: Policy
    bytes: int
    idle: bool


class Sizer:
    """Sizes of one policy under any settings of its params. Where layers are alike, one of them is planned."""

    def __init__(self, policy: Policy, geometry: ModelGeometry, lengths: Lengths) -> None:
        self.policy, self.geometry, self.lengths = policy, geometry, lengths
        self.refusal = ""
        self._known: dict[tuple[tuple[str, str], ...], Sized | None] = {}

    def __call__(self, settings: Mapping[str, str]) -> Sized | None:
        """None where the language or the plan refuses these settings; ``refusal`` is then the first reason."""
        key = tuple(sorted(settings.items()))
        if key not in self._known:
            try:
                self._known[key] = self._sized(settings)
            except (PolicyError, UsageError) as refusal:
                self.refusal = self.refusal or str(refusal).splitlines()[0]
                self._known[key] = None
        return self._known[key]

    def takes(self, settings: Mapping[str, str]) -> bool:
        """Whether the language and a plan take these settings; where layers differ, asked of ``FEW`` of them."""
        if not self._differ or self.policy.overrides or self.geometry.layers <= FEW:
            return self(settings) is not None
        try:
            self._plan(self.policy.bind(**settings), FEW)
        except (PolicyError, UsageError):
            return False
        return True

    @cached_property
    def full(self) -> int:
        """Bytes of the full cache, without any notes about it."""
        return self._plan(load_policy(FULL), self.geometry.layers).dense_bytes

    def _sized(self, settings: Mapping[str, str]) -> Sized:
        policy = self.policy.bind(**settings) if settings else self.policy
        plan = self._plan(policy, self.geometry.layers if self._differ else 1)
        others = 0 if self._differ else (self.geometry.layers - 1) * plan.layers[0].bytes
        return Sized(policy, plan.bytes + others, plan.never_fires)

    def _plan(self, policy: Policy, layers: int) -> Plan:
        return make_plan(
            policy,
            replace(self.geometry, layers=layers),
            prompt=self.lengths.prompt,
            max_new_tokens=self.lengths.new_tokens,
        )

    @cached_property
    def _differ(self) -> bool:
        return minds_layers(self.policy)
