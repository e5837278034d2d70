"""Which lengths a cache is planned for: those of a call, a bucket of like ones, or what was said once for all calls."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.language import Policy
from kvpolicy.plan import ModelGeometry, Plan, make_plan

Lengths = int | tuple[int, int]

SHARED = 128  # tokens: prompts between two multiples of it are planned alike where steps are compiled


@lru_cache(maxsize=64)
def plan_for(
    policy: Policy, geometry: ModelGeometry, prompt: Lengths, max_new_tokens: int, batch: int, turns: int = 1
) -> Plan:
    """Plans are frozen, and take tens of milliseconds to make: every call of `generate` needs one."""
    return make_plan(policy, geometry, batch=batch, prompt=prompt, max_new_tokens=max_new_tokens, turns=turns)


def bucket(prompt: tuple[int, int]) -> tuple[int, int]:
    """The prompt lengths (fewest, most) that are planned alike with these, where steps are compiled."""
    low, high = prompt
    return max(min(low, 1), (low - 1) // SHARED * SHARED), -(-high // SHARED) * SHARED


@lru_cache(maxsize=64)
def shared_plan(
    policy: Policy, geometry: ModelGeometry, prompt: tuple[int, int], max_new_tokens: int, batch: int
) -> Plan:
    """The plan for a whole bucket of prompt lengths, so that a new length adds no graph.

    A policy may have no room for the longest of them; then the plan is for the longest it has room for, which is the
    same for all of the bucket, or, where that is no way out either, for the given lengths alone.
    """
    low, high = bucket(prompt)

    def attempt(most: int) -> Plan | None:
        with suppress(UsageError, PolicyError):
            return plan_for(policy, geometry, (low, most), max_new_tokens, batch)
        return None

    found = attempt(high)
    fits, refused = prompt[1], high
    if found is None:
        found = attempt(fits)
        while found is not None and refused - fits > 1:
            middle = (fits + refused) // 2
            better = attempt(middle)
            found, fits, refused = (found, fits, middle) if better is None else (better, middle, refused)
    return found or plan_for(policy, geometry, prompt, max_new_tokens, batch)


@dataclass(frozen=True)
class Room:
    """The most that any call of `generate` will bring, said once: caches are then planned for that and are all alike.

    max_prompt: prompt tokens of a row; max_new_tokens: generated ones. None: as each call says.
    """

    max_prompt: int | None = None
    max_new_tokens: int | None = None

    def check(self, policy: Policy, geometry: ModelGeometry) -> None:
        """Refuse room that the policy cannot use.

        Raises:
            UsageError: less than one token, a prompt beyond what the policy can hold, or a number of new tokens for a
                policy whose own numbers read it.
        """
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; give the most tokens that a call of generate will bring")
        if self.max_new_tokens is not None and policy.reads("max_new_tokens"):
            params = [name for name, param in policy.params.items() if "max_new_tokens" in param.value.names]
            way_out = f"give {' and '.join(f'{name}=…' for name in params)} a number of its own" if params else ""
            raise UsageError(
                f"{policy.name} computes with max_new_tokens, the length of each call, and planning every call for "
                f"{self.max_new_tokens} would change what it keeps; {way_out or 'write a number in its place'}, or "
                "leave max_new_tokens out"
            )
        if self.max_prompt is not None:
            plan_for(policy, geometry, (1, self.max_prompt), self.max_new_tokens or 1, 1)

    def widen(self, prompt: tuple[int, int], max_new_tokens: int) -> tuple[tuple[int, int] | None, int]:
        """What to plan for in place of a call's own lengths: prompt tokens (None: its own), and new ones.

        Raises:
            UsageError: the call brings more than was said.
        """
        for name, what, brought in (
            ("max_prompt", "a prompt of", prompt[1]),
            ("max_new_tokens", "room for", max_new_tokens),
        ):
            most = getattr(self, name)
            if most is not None and brought > most:
                raise UsageError(
                    f"this call of generate brings {what} {brought} {'new ' * (name != 'max_prompt')}tokens, and the "
                    f"policy was applied with {name}={most}; apply it with more, or ask for less"
                )
        wide = None if self.max_prompt is None else (min(prompt[0], 1), self.max_prompt)
        return wide, self.max_new_tokens or max_new_tokens
