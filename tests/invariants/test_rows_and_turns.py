"""Rows do not know of one another, and a turn is like the first: for every shipped policy."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kvpolicy
from kvpolicy.errors import KvpolicyError
from kvpolicy.language import Policy
from kvpolicy.testing.beside import Beside
from kvpolicy.testing.models import random_model
from tests.invariants.policies import COVER, GEOMETRY, NAMES, grow, loaded, thorough, tight_plan, tight_sizes

LENGTHS = (27, 9, 18, 1, 22, 14, 27, 5)
VOCABULARY = 97
STEPS = 200
"""The most that is decoded here."""

Kept = list[list[Tensor]]
"""By step and layer, the positions that a row keeps [K, S], sorted."""


def text(model: Any, prompts: list[Tensor], steps: list[int]) -> tuple[list[list[int]], list[Kept]]:
    """Decode rows of a left-padded batch, each for so many steps, and then feed it padding as `generate` does; returns
    each row's tokens, and what it kept after the prompt and each of its steps."""
    lengths, rows = [len(prompt) for prompt in prompts], len(prompts)
    longest = max(lengths)
    ids = torch.stack([torch.cat([prompt.new_zeros(longest - len(prompt)), prompt]) for prompt in prompts])
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    cache = kvpolicy.cache_for(model, prompt=(min(lengths), longest), max_new_tokens=max(steps), batch=rows)
    # No two steps alike; as many for a row alone as for a batch, since the last numbers of a draw go by its size.
    nudge = torch.randn(STEPS + 1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    said: list[list[int]] = [[] for _ in prompts]
    kept: list[Kept] = [[] for _ in prompts]
    for step in range(max(steps) + 1):
        places = (mask.cumsum(1) - 1)[:, -ids.shape[1] :].clamp(min=0)
        out = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, logits_to_keep=1)
        chosen = (out.logits[:, -1] + nudge[step]).argmax(-1)
        now = [cache.positions(layer).sort(-1, descending=True).values for layer in range(len(cache.layers))]
        for row in range(rows):
            if step <= steps[row]:
                kept[row].append([each[row] for each in now])
                said[row].append(int(chosen[row]))
        done = torch.tensor([step >= end for end in steps])
        ids = torch.where(done, 0, chosen)[:, None]
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
    return said, kept


def alike(alone: Kept, batched: Kept) -> bool:
    """Slots of the two caches may be more or fewer: -1 stands for an empty one, at the end."""
    pairs = ((a, b) for one, other in zip(alone, batched, strict=True) for a, b in zip(one, other, strict=True))
    for a, b in pairs:
        width = min(a.shape[-1], b.shape[-1])
        if not (a[:, :width].equal(b[:, :width]) and (a[:, width:] < 0).all() and (b[:, width:] < 0).all()):
            return False
    return True


def check_rows(policy: Policy, steps: int, rows: list[int]) -> None:
    """Eight rows that end at different times, and these of them alone.

    In float64: a batch adds up in another order, and over thousands of choices two scores come as close in float32.
    """
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    ends = [steps - at * steps // 10 for at in (0, 3, 1, 0, 5, 2, 7, 4)]
    with torch.no_grad(), kvpolicy.applied(random_model().double(), policy) as model:
        said, kept = text(model, prompts, ends)
        for row in rows:
            (alone,), (kept_alone,) = text(model, [prompts[row]], [ends[row]])
            assert alone == said[row]
            assert alike(kept_alone, kept[row])


def long_enough(name: str, steps: int) -> Policy:
    """The policy at its tight sizes, or a multiple with which it takes these prompts and steps."""
    for factor in (1, 1.5, 2, 3):
        policy = loaded(name, tuple((param, grow(value, factor)) for param, value in tight_sizes(name)))
        try:
            for prompt in ((1, 27), 27, 1):
                kvpolicy.make_plan(policy, GEOMETRY, prompt=prompt, max_new_tokens=steps)
        except KvpolicyError as refusal:
            reason = refusal
        else:
            return policy
    raise reason


@pytest.mark.parametrize("name", COVER)
def test_a_row_in_a_padded_batch_is_the_row_alone(name: str) -> None:
    check_rows(long_enough(name, 30), 30, [3])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_eight_is_the_row_alone_for_two_hundred_steps(name: str) -> None:
    check_rows(long_enough(name, STEPS), STEPS, list(range(8)))


TALK = (((20, 11), 12), ((5, 9), 9), ((1, 4), 1), ((7, 0), 13), ((3, 3), 25))
"""Five turns of two rows, each with the tokens generated after it: one of a single token, one that brings a row
nothing, one after a single generated token."""


@pytest.mark.parametrize("name", thorough())
def test_five_turns_keep_what_the_oracle_keeps(name: str) -> None:
    """The runtime is held against the oracle after every pass, which raises where they part."""
    rows = [sum(turn) for turn in zip(*(prompts for prompts, _ in TALK), strict=True)]
    lengths = {"prompt": (min(TALK[0][0]), max(rows)), "max_new_tokens": sum(steps for _, steps in TALK), "turns": 5}
    beside = Beside(tight_plan(name, GEOMETRY, batch=2, **lengths))
    generator = torch.Generator().manual_seed(3)

    def said(columns: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        heads = (GEOMETRY.query_heads, GEOMETRY.kv_heads, GEOMETRY.kv_heads)
        shapes = [(2, count, columns, GEOMETRY.head_dim) for count in heads]
        return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(GEOMETRY.layers)]

    for prompts, steps in TALK:
        longest = max(prompts)
        beside.feed(said(longest), torch.arange(longest) >= longest - torch.tensor(prompts)[:, None], kind="prompt")
        for _ in range(steps):
            beside.feed(said(1))
    assert beside.agreement.compared >= (5 + 60) * 3 * 2 * 2
    assert len(beside.agreement.near_ties) <= beside.agreement.compared // 100, beside.agreement.summary()


def test_a_row_is_told_from_another_cache() -> None:
    """The comparison itself: another token at one place is another set."""
    same = [[torch.tensor([[3, 1, -1]])]]
    assert alike(same, [[torch.tensor([[3, 1]])]])
    assert not alike(same, [[torch.tensor([[3, 2, -1]])]]) and not alike(same, [[torch.tensor([[3]])]])
