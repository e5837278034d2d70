"""What always holds, for every shipped policy on every architecture, with tiny random models."""

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy.architecture import architectures
from kvpolicy.testing.live import LiveAgreement
from kvpolicy.testing.models import random_model
from tests.invariants.policies import COVER, EVICTING, NAMES, drops, roomy, smallest, spread, thorough, tight

FAMILIES = sorted(name for name, family in architectures().items() if not family.images_see_ahead)
"""Prompts here are any ids, those of images among them."""

STEPS = 40


def model_for(name: str, family: str):
    """A model of the family; of Llama's, where keys are turned anew as Llama turns them, or ranked by their length, as
    some families normalise keys, and with random weights all are as long."""
    as_llama = kvpolicy.load_policy(name).positions == "compact" or name == "knorm"
    return random_model("llama" if as_llama else family)


def next_tokens(rows: int, seed: int = 9, steps: int = STEPS) -> torch.Tensor:
    """Tokens to generate by teacher forcing [steps, rows, 1]."""
    return torch.randint(2, 97, (steps, rows, 1), generator=torch.Generator().manual_seed(seed))


def run(model, cache, ids, mask, tokens):
    """Logits of the newest token after the prompt and after each forced token [1 + steps, B, V]."""
    logits = []
    with torch.no_grad():
        for new in (ids, *tokens):
            mask = mask if new is ids else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            out = model(new, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize(("name", "family"), spread(NAMES, FAMILIES))
def test_with_room_for_everything_the_logits_are_the_models_own(name, family, ragged):
    ids, mask = ragged
    model, tokens = model_for(name, family), next_tokens(3)
    expected = run(model, DynamicCache(config=model.config), ids, mask, tokens)
    with kvpolicy.applied(model, roomy(name)):
        cache = kvpolicy.cache_for(model, prompt=(9, 27), max_new_tokens=STEPS, batch=3)
        got = run(model, cache, ids, mask, tokens)
    assert cache.stats()["evicted"] == 0
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("name", "family"), spread(NAMES, FAMILIES))
def test_a_live_model_keeps_what_the_oracle_keeps_within_the_plan(name, family, ragged):
    ids, mask = ragged
    model = kvpolicy.apply(model_for(name, family), tight(name))
    live = LiveAgreement(model, prompt=(9, 27), max_new_tokens=STEPS, batch=3)
    plan, cache = live.cache.plan, live.cache
    assert cache.bytes == plan.bytes
    live.feed(ids, mask)
    for new in next_tokens(3):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        live.feed(new, mask)
        for number, layer in enumerate(plan.layers):
            held = (cache.positions(number) >= 0).sum(-1)
            shared = sum(pool.capacity for pool in layer.shared)
            assert int(held.max()) <= layer.slots + shared
            assert int(held.sum(-1).max()) <= layer.slots * held.shape[1] + shared
            if cache.moment.kind != "plain" and all(pool.cadence == 1 for pool in layer.pools if pool.evicts):
                assert int(held.max()) <= layer.bound
    assert cache.bytes == plan.bytes
    assert live.agreement.compared >= (1 + STEPS) * 3 * len(plan.layers) * 2  # chunks are compared too
    assert len(live.agreement.near_ties) <= live.agreement.compared // 100, live.agreement.summary()
    assert name not in EVICTING or cache.stats()["evicted"] > 0


@pytest.mark.parametrize("name", thorough())
def test_permuted_rows_give_permuted_results(name, ragged):
    ids, mask = ragged
    model, tokens = kvpolicy.apply(random_model(), tight(name)), next_tokens(3)
    order = torch.tensor([2, 0, 1])
    caches = [kvpolicy.cache_for(model, prompt=(9, 27), max_new_tokens=STEPS, batch=3) for _ in range(2)]
    straight = run(model, caches[0], ids, mask, tokens)
    permuted = run(model, caches[1], ids[order], mask[order], tokens[:, order])
    torch.testing.assert_close(permuted, straight[:, order], atol=1e-5, rtol=1e-4)
    for layer in range(3):
        kept = [cache.positions(layer).sort(-1).values for cache in caches]
        assert kept[1].equal(kept[0][order])


@pytest.mark.parametrize(("name", "dtype"), spread(NAMES, [torch.bfloat16, torch.float16], COVER))
def test_short_floats_stay_finite_and_within_the_plan(name, dtype, ragged):
    ids, mask = ragged
    model = kvpolicy.apply(random_model(dtype=dtype), tight(name))
    cache = kvpolicy.cache_for(model, prompt=(9, 27), max_new_tokens=STEPS, batch=3)
    logits = run(model, cache, ids, mask, next_tokens(3))
    assert logits.dtype == dtype and logits.isfinite().all()
    assert cache.bytes == cache.plan.bytes
    assert {part.state.keys.dtype for part in getattr(cache.layers[0], "parts", cache.layers[:1])} == {dtype}


@pytest.mark.parametrize("name", thorough(EVICTING))
def test_a_policy_that_never_fired_says_so(name):
    model = kvpolicy.apply(random_model(), roomy(name))
    ids = torch.arange(2, 12)[None]
    cache = kvpolicy.cache_for(model, prompt=10, max_new_tokens=STEPS)
    assert cache.plan.never_fires or not drops(cache.plan)
    run(model, cache, ids, torch.ones_like(ids), next_tokens(1))
    assert cache.stats()["evicted"] == 0
    small = kvpolicy.apply(random_model(seed=1), tight(name))
    assert not kvpolicy.cache_for(small, prompt=24, max_new_tokens=STEPS).plan.never_fires


@pytest.mark.parametrize(("name", "heads"), spread(NAMES, [(4, 2), (1, 1)], COVER))
def test_the_smallest_sizes_work(name, heads):
    model = random_model(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    kvpolicy.apply(model, smallest(name))
    live = LiveAgreement(model, prompt=1, max_new_tokens=20)
    live.feed(torch.tensor([[5]]))
    for new in next_tokens(1)[:20]:
        assert live.feed(new).isfinite().all()


@pytest.mark.parametrize("name", thorough())
def test_a_prompt_shorter_than_every_window(name):
    model = kvpolicy.apply(random_model(), tight(name))
    steps = 2 * STEPS  # with almost no prompt the generated tokens alone must fill every budget
    live = LiveAgreement(model, prompt=2, max_new_tokens=steps)
    live.feed(torch.tensor([[5, 6]]))
    for new in next_tokens(1, steps=steps):
        live.feed(new)
    assert drops(live.cache.plan) == (live.cache.stats()["evicted"] > 0)
