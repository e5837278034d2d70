"""What every family must show, on a small random model: the parity kit. A family needs no file here.

Its model is what `random_model` makes of the family's own config class; what that config must say beside the sizes that
all share stands in `kvpolicy/testing/models.py`.
"""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import kvpolicy
from kvpolicy.architecture import families
from kvpolicy.plan import ModelGeometry
from kvpolicy.testing.live import LiveAgreement
from kvpolicy.testing.models import random_model

STEPS = 64
LENGTHS = (17, 11)

ROOMY = {"heavy": 100, "recent": 100}
"""h2o sums the attention of every query, and here has room for all tokens."""

TIGHT = {"h2o": {"heavy": 5, "recent": 4}, "raas": {"budget": 32, "page_size": 4}}
"""Policies that rank by attention, of the model's own queries or of bounds on it, and evict early."""

SHIPPED = [(model_type, family) for family in families().values() for model_type in family.model_types]
MODEL_TYPES = [model_type for model_type, family in SHIPPED if not family.refused]
REFUSED = [model_type for model_type, family in SHIPPED if family.refused]


@cache
def _built(model_type: str) -> Any:
    return random_model(model_type, num_hidden_layers=2)


def build(model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of one's own, the same in every test; skips where this transformers does not know its type."""
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers does not know {model_type}")
    return copy.deepcopy(_built(model_type)).to(dtype)


def batch(steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Ids and mask [2, prompt + steps] of a left-padded batch: a row of 17 prompt tokens and one of 11."""
    longest = max(LENGTHS)
    ids = torch.randint(2, 90, (2, longest + steps), generator=torch.Generator().manual_seed(7))
    mask = torch.stack([torch.arange(longest + steps) >= longest - length for length in LENGTHS]).long()
    return ids * mask, mask


def places(mask: Tensor) -> Tensor:
    """Where each column stands in its row's text."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def teacher_forced(model: Any, past: Any, steps: int = STEPS) -> Tensor:
    """Logits [tokens of all rows, V] in float32: of a prompt, read at once, and of tokens that follow, one by one."""
    ids, mask = batch(steps)
    where, longest, found = places(mask), max(LENGTHS), []
    for first, end in [(0, longest), *((at, at + 1) for at in range(longest, ids.shape[1]))]:
        given = {"attention_mask": mask[:, :end], "position_ids": where[:, first:end]}
        found.append(model(ids[:, first:end], past_key_values=past, **given).logits)
    return torch.cat(found, 1)[mask.bool()].float()


@torch.no_grad()
def unpatched(model: Any, steps: int = STEPS) -> Tensor:
    """The same logits from the model alone, which reads the whole text at once and needs no cache.

    Where layers keep a state, reading at once is another sum than going step by step, so it goes step by step as well.
    """
    if ModelGeometry.from_config(model.config).states:
        return teacher_forced(model, DynamicCache(config=model.config), steps)
    ids, mask = batch(steps)
    logits: Tensor = model(ids, attention_mask=mask, position_ids=places(mask), use_cache=False).logits
    return logits[mask.bool()].float()


def with_room(model: Any, steps: int = STEPS) -> Tensor:
    """The same logits under a policy whose budget is above the length; it comes off again."""
    with kvpolicy.applied(model, "h2o", **ROOMY):
        past = kvpolicy.cache_for(model, prompt=(min(LENGTHS), max(LENGTHS)), max_new_tokens=steps, batch=2)
        logits = teacher_forced(model, past, steps)
    assert past.stats()["evicted"] == 0
    return logits


def beside_the_oracle(model: Any, policy: str, steps: int, *, relative: float | None = None) -> LiveAgreement:
    """The model under a small budget, every pass of every layer held against the oracle; returns the comparison.

    relative: how far apart two scores may be and yet change places, where that is more than float32's share.
    """
    kvpolicy.apply(model, policy, **TIGHT[policy])
    live = LiveAgreement(model, prompt=(min(LENGTHS), max(LENGTHS)), max_new_tokens=steps, batch=2)
    if relative is not None:
        live.agreement.relative = relative
        live.agreement.output_tolerance = 2 * relative  # weights off by so much, on values larger than their mixture
    ids, mask = batch(steps)
    longest = max(LENGTHS)
    live.feed(ids[:, :longest], mask[:, :longest])
    for at in range(longest, longest + steps):
        live.feed(ids[:, at : at + 1], mask[:, : at + 1])
    return live
