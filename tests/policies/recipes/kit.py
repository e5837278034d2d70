"""Holds a policy to a transcription of its paper: the same tokens after every pass, in every layer and KV head.

A recipe is a function of one layer's queries, keys and values (``plain.py``) that yields, for the prompt pass and then
for every generated one, what each KV head keeps. It is the paper in a few naive lines; kvpolicy has no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvpolicy.language import Policy
from kvpolicy.plan import unsupported
from kvpolicy.testing.attention import Attention
from kvpolicy.testing.feeding import OracleAlone, RuntimeBeside, plan_for, watch
from kvpolicy.testing.seen import Seen
from tests.policies.recipes.plain import Head, Layer

Recipe = Callable[[Layer], Iterator[Sequence[Head]]]


def text(seed: int = 0, *, prompt: int = 40, steps: int = 200, layers: int = 1, spread: float = 1.5) -> Attention:
    """Random queries, keys and values: one row, 2 KV heads of 2 query heads, size 8; ``spread`` sharpens attention."""
    random = np.random.default_rng(seed)

    def drawn(heads: int, scale: float) -> tuple[np.ndarray, ...]:
        return (random.normal(scale=scale, size=(layers, heads, prompt + steps, 8)).astype(np.float32),)

    return Attention((prompt,), steps, drawn(4, spread), drawn(2, spread), drawn(2, 1.0))


def watched(policy: Policy, said: Attention) -> Iterator[Seen]:
    """Every layer and KV head after every pass: of the oracle, and of the runtime beside it where it runs the policy.

    The runtime is compared with the oracle at every pass; no choice may be so close that float32 cannot tell.
    """
    plan = plan_for(policy, said)
    feed = OracleAlone(plan) if any(unsupported(plan)) else RuntimeBeside(plan)
    yield from watch(feed, said)
    assert feed.near_ties == 0, "another seed, please: float32 cannot tell two scores of this text apart"


def check(policy: Policy, recipe: Recipe, said: Attention | None = None) -> None:
    """The policy keeps, and reads, exactly what the recipe does, and drops or leaves unread something at all."""
    said = text() if said is None else said
    layers, (prompt,) = said.geometry.layers, said.prompts
    spoken = [
        Layer(
            number, layers, prompt, *(rows[0][number].astype(float) for rows in (said.queries, said.keys, said.values))
        )
        for number in range(layers)
    ]
    passes = [list(recipe(layer)) for layer in spoken]
    assert {len(of_layer) for of_layer in passes} == {1 + said.steps}, (
        "a recipe yields once for the prompt, then a step"
    )
    busy = False
    for seen in watched(policy, said):
        if seen.step.prompt_len < prompt:
            continue  # more of the prompt is to come
        layer, _, head = seen.place
        wanted = passes[layer][seen.step.t][head]
        where = f"layer {layer}, head {head}, t {seen.step.t}"
        assert seen.kept() == wanted.kept, f"kept, {where}: {differences(seen.kept(), wanted.kept)}"
        if wanted.read is not None:
            read = frozenset().union(*(pool.read for pool in seen.step.heads[head].values()))
            assert read == wanted.read, f"read, {where}: {differences(read, wanted.read)}"
        busy |= len(wanted.kept) <= seen.newest or len(wanted.read or wanted.kept) < len(wanted.kept)
    assert busy, "nothing was dropped or left unread: there is nothing to agree about"


def differences(policy: frozenset[int], recipe: set[int]) -> str:
    """What one has and the other has not."""
    return f"the policy alone has {sorted(policy - recipe)}, the recipe alone {sorted(recipe - policy)}"
