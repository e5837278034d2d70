"""A model whose layers lie on two devices: each layer's slots lie with it, and no operation mixes the two."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device

import kvpolicy
from kvpolicy.errors import UsageError
from kvpolicy.testing.models import random_model
from tests.invariants.policies import COVER, GEOMETRY, NAMES, loaded, tight_sizes
from tests.patching.apart import FIRST, SECOND, Apart, Mixed, put

STEPS = 24
REST = sorted(set(NAMES) - set(COVER[::4]))
SIZES = {"heavy": "4", "recent": "8"}


class Moves(ModelHook):
    """Brings what a module is called with to where it lies, as accelerate's own hook does for `device_map`."""

    def __init__(self, device):
        self.device = device

    def pre_forward(self, module, *args, **kwargs):
        cache = kwargs.pop("past_key_values", None)  # accelerate leaves transformers' caches alone
        args, kwargs = send_to_device(args, self.device), send_to_device(kwargs, self.device)
        return args, kwargs if cache is None else {**kwargs, "past_key_values": cache}


def spread(family="llama"):
    """A model of which all but the embedding and the first layer is on the second device."""
    model = random_model(family)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # where tied, one on each device
    first = [model.model.embed_tokens, model.model.layers[0]]
    held = [
        part
        for part in (*model.model.children(), *model.model.layers, model.lm_head)
        if next(part.parameters(), None) is not None
    ]
    put(model, FIRST)
    for part in held:
        if part not in first and part is not model.model.layers:
            put(part, SECOND)
            add_hook_to_module(part, Moves(SECOND))
    for part in (model.model, *first):
        add_hook_to_module(part, Moves(FIRST))
    return model


def prompt():
    ids = torch.randint(2, 97, (2, 19), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return ids, mask


def said(model, ids, mask, **arguments):
    return model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, pad_token_id=0, **arguments)


@pytest.mark.parametrize("name", [*COVER[::4], *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_a_model_on_two_devices_says_what_it_says_on_one(name):
    policy, (ids, mask) = loaded(name, tight_sizes(name)), prompt()
    with kvpolicy.applied(random_model(), policy) as model:
        alone = said(model, ids, mask)
        whole = kvpolicy.cache_for(model, prompt=(13, 19), max_new_tokens=STEPS, batch=2)
        said(model, ids, mask, past_key_values=whole)
    with Apart() as apart, kvpolicy.applied(spread(), policy) as model:
        here, there = ids.to(FIRST), mask.to(FIRST)
        together = said(model, here, there)
        cache = kvpolicy.cache_for(model, prompt=(13, 19), max_new_tokens=STEPS, batch=2)
        said(model, here, there, past_key_values=cache)
        assert {part.state.position.device for part in cache.governed[0].parts} == {FIRST}
        assert {part.state.position.device for layer in cache.governed[1:] for part in layer.parts} == {SECOND}
    assert apart.met >= {FIRST, SECOND}
    assert together.equal(alone)
    for layer in range(GEOMETRY.layers):
        assert cache.positions(layer).sort(-1).values.equal(whole.positions(layer).sort(-1).values)


def test_kernels_stay_away():
    """They would start on whichever device is current."""
    with Apart():
        with pytest.raises(UsageError, match="triton cannot run here: the layers lie on 2 devices"):
            kvpolicy.apply(spread(), "h2o", backend="triton")
        model = kvpolicy.apply(spread(), "h2o", **SIZES)
        assert kvpolicy.cache_for(model, prompt=9, max_new_tokens=2).backend == "torch"


@pytest.mark.parametrize("family", ["gemma2", "llama4_text", "lfm2"])
def test_layers_of_their_own_kind_lie_with_their_weights(family):
    ids, mask = prompt()
    with kvpolicy.applied(random_model(family), "h2o", **SIZES) as model:
        alone = said(model, ids, mask)
    with Apart(), kvpolicy.applied(spread(family), "h2o", **SIZES) as model:
        together = said(model, ids.to(FIRST), mask.to(FIRST))
    assert together.equal(alone)


@pytest.mark.parametrize("name", ["raas", "pyramidinfer"])
def test_turns_chunks_copies_and_beams(name):
    policy, (ids, mask) = loaded(name, tight_sizes(name)), prompt()
    more = torch.randint(2, 97, (2, 5), generator=torch.Generator().manual_seed(4))

    def talk(model, *given):
        ids, mask, more = given
        first = said(model, ids, mask, return_dict_in_generate=True)
        cache, fork = first.past_key_values, first.past_key_values.copy()
        longer = torch.cat([first.sequences, more], 1)
        wider = torch.cat([mask, mask.new_ones(2, longer.shape[1] - mask.shape[1])], 1)
        second = said(model, longer, wider, past_key_values=cache)
        assert said(model, longer, wider, past_key_values=fork).equal(second)
        return second, said(model, ids, mask, num_beams=3), said(model, ids, mask, prefill_chunk_size=4)

    with kvpolicy.applied(random_model(), policy) as model:
        alone = talk(model, ids, mask, more)
    with Apart(), kvpolicy.applied(spread(), policy) as model:
        together = talk(model, ids.to(FIRST), mask.to(FIRST), more.to(FIRST))
    assert all(one.equal(other) for one, other in zip(alone, together, strict=True))


def test_operations_over_two_devices_are_caught():
    """The pretended devices themselves: without the layers' own clocks, this would be a GPU's error."""
    with Apart():
        one, other = torch.ones(3, device=FIRST), torch.ones(3).to(SECOND)
        with pytest.raises(Mixed):
            one + other
        assert (one + 1).device == FIRST and other.new_zeros(2).device == SECOND
        assert one.to(other).device == SECOND and one.to(torch.float64).device == FIRST
        assert one.copy_(other).device == FIRST
