"""Texts taken layer by layer: what is kept and what comes out is what one step after the other through the model gives,
for every policy."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from kvpolicy.errors import CacheError, ModelError, PolicyError, UsageError
from kvpolicy.lab.compare.arms import Arm, bound
from kvpolicy.lab.fidelity.forcing import Lead
from kvpolicy.lab.fidelity.full_cache import Body, Forced
from kvpolicy.lab.fidelity.mass import Mass
from kvpolicy.lab.fidelity.prompts import Reading, read
from kvpolicy.language import Policy, load_policy, loads_policy, shipped_policies
from kvpolicy.models import load_model
from kvpolicy.patching import applied, cache_for, compile_report
from kvpolicy.plan import ModelGeometry
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.ahead import Ahead
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.moment import GIVEN
from kvpolicy.testing.models import random_model

PROMPT, NEW = 32, 24


@cache
def tiny() -> tuple[Any, Any]:
    return load_model("builtin:tiny")


@cache
def texts() -> list[Forced]:
    """Prompts of 32, 25 and 18 tokens, outputs of 24, 17 and 24. No token comes twice in a text: two keys would be of
    one length, and float32 would choose between them."""
    draw = torch.Generator().manual_seed(3)
    lengths = ((PROMPT, NEW), (PROMPT - 7, NEW - 7), (PROMPT - 14, NEW))
    ids = [torch.randperm(60, generator=draw)[: prompt + output] + 3 for prompt, output in lengths]
    return [
        Forced(number, each[:prompt], each[prompt:])
        for number, (each, (prompt, _)) in enumerate(zip(ids, lengths, strict=True))
    ]


def small(name: str) -> Policy:
    """A shipped policy with so little room that these texts make it drop something, where it can have that."""
    policy, shape = load_policy(name), ModelGeometry.from_config(tiny()[0].config, "float32")
    for budget in (32, 40):
        try:
            return bound(Arm(name, policy, budget), shape, prompt=PROMPT, max_new_tokens=NEW).policy
        except (UsageError, PolicyError):
            continue
    return policy


@torch.no_grad()
def led(
    policy: Policy,
    by_layer: bool,
    every: int = 0,
    reading: Reading | None = None,
    compile: str | bool = False,
    model: Any = None,
) -> tuple[Tensor, PolicyCache, dict[int, Any]]:
    """Hidden states [B, M, D], the cache at the end, and the mass kept by place."""
    model, special = (model, [0]) if model is not None else tiny()
    with applied(model, policy, special_tokens=special, compile=compile):
        kept = cache_for(model, prompt=(PROMPT - 14, PROMPT), max_new_tokens=NEW, batch=3)
        lead = Lead(Body(model), kept, texts(), by_layer=by_layer, reading=reading)
        mass = Mass(kept, every or NEW)
        with mass if every else nullcontext():
            said = torch.cat([states.clone() for _, states in lead.run(19)], 1)
    return said, kept, mass.by_place


def tokens_kept(kept: PolicyCache) -> list[Tensor]:
    """By layer, positions in order [B, K, S]."""
    return [kept.positions(layer).sort(-1).values for layer in range(len(kept.governed))]


def same(one: tuple[Tensor, PolicyCache, Any], other: tuple[Tensor, PolicyCache, Any]) -> bool:
    kept = all(map(torch.equal, tokens_kept(one[1]), tokens_kept(other[1])))
    return kept and one[0].shape == other[0].shape and torch.allclose(one[0], other[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("h2o", "quest-raas", "scope-slide") else pytest.mark.slow)
        for name in shipped_policies()
    ],
)
def test_layer_by_layer_is_step_by_step(name: str) -> None:
    policy = small(name)
    layers, steps = led(policy, True), led(policy, False)
    assert same(layers, steps)
    assert layers[1].stats() == steps[1].stats() | {"passes": layers[1].passes}
    assert layers[1].passes == steps[1].passes
    assert layers[1].get_seq_length() == PROMPT + NEW - 1


@cache
def read_by_dense() -> Reading:
    """Prompts as the full cache's arm leaves them."""
    reading = Reading(tiny()[0], texts())
    led(load_policy("dense"), True, reading=reading)
    return reading


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("h2o", "quest-raas", "keydiff") else pytest.mark.slow)
        for name in shipped_policies()
    ],
)
def test_prompts_that_another_policy_read_are_the_same(name: str) -> None:
    policy, reading = small(name), read_by_dense()
    assert reading.said is not None
    shown, own = led(policy, True, reading=reading), led(policy, True)
    assert same(shown, own)
    assert shown[1].stats() == own[1].stats()


def test_a_policy_that_drops_between_chunks_reads_its_own_prompts() -> None:
    policy = next(each for each in map(small, shipped_policies()) if each.prompt_chunk is not None)
    reading = Reading(tiny()[0], texts())
    led(policy, True, reading=reading)
    assert reading.said is None


def test_prompts_too_large_to_keep_are_read_by_every_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpolicy.lab.fidelity.prompts.MOST_BYTES", 1000)
    reading = Reading(tiny()[0], texts())
    assert same(led(small("h2o"), True, reading=reading), led(small("h2o"), True))
    assert reading.said is None


def test_what_a_prompts_queries_paid_is_summed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reading = small("h2o"), Reading(tiny()[0], texts())
    led(load_policy("dense"), True, reading=reading)
    led(policy, True, reading=reading)
    own, told = led(policy.bind(heavy=5), True), Mock(side_effect=AssertionError)
    monkeypatch.setattr("kvpolicy.runtime.prompt_pass.attend_prompt_and_sum", told)
    assert same(led(policy.bind(heavy=5), True, reading=reading), own)


def test_layers_of_a_shown_prompt_are_as_they_were() -> None:
    model = tiny()[0]
    before = [dict(vars(layer)) for layer in model.model.layers]
    led(small("h2o"), True, reading=read_by_dense())
    assert [dict(vars(layer)) for layer in model.model.layers] == before


@pytest.mark.parametrize("name", ["h2o", "raas", "quest", "scope-adaptive", "duo-attention"])
def test_token_steps_inside_a_pass_compile(name: str) -> None:
    policy = small(name)
    compiled, eager = led(policy, True, compile="aot_eager", every=5), led(policy, True, every=5)
    assert same(compiled, eager)
    assert all(torch.allclose(by_row, eager[2][place], atol=1e-5) for place, by_row in compiled[2].items())


def test_a_compiled_pass_costs_one_graph_a_kind_and_none_to_the_next() -> None:
    model, tokenizer = tiny()
    with applied(model, small("raas"), special_tokens=tokenizer, compile="aot_eager"):
        for _ in range(2):
            kept = cache_for(model, prompt=(PROMPT - 14, PROMPT), max_new_tokens=NEW, batch=3)
            with torch.no_grad():
                for _ in Lead(Body(model), kept, texts(), by_layer=True).run(7):
                    pass
        report = compile_report(model)
    assert (report.graphs, report.graph_breaks, report.recompiles) == (2, 0, 0)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama4_text"])
def test_layers_that_see_what_is_near_go_the_same_way(name: str) -> None:
    """Beside them logits are capped, sinks take a share, or queries are tempered."""
    model, policy = random_model(name), load_policy("h2o", set={"heavy": 5, "recent": 4})
    reading = Reading(model, texts())
    led(load_policy("dense"), True, reading=reading, model=model)
    steps = led(policy, False, model=model)
    assert same(led(policy, True, model=model), steps)
    assert same(led(policy, True, reading=reading, model=model), steps)
    assert same(led(policy, True, compile="aot_eager", model=model), steps)


def test_a_model_that_sees_and_has_no_base_is_refused() -> None:
    with pytest.raises(ModelError, match="load its text model"):
        Body(random_model("llama4"))


def test_special_tokens_are_told_where_the_decoder_is_led_alone() -> None:
    pools = "{marks: {admit: {tokens: special}}, rest: {admit: all}}"
    marks = loads_policy(f"kvpolicy: 1\nname: marks\npools: {pools}\n")
    model = random_model("llama4_text")
    with applied(model, marks, special_tokens=[int(texts()[0].prompt[3])]):
        kept = cache_for(model, prompt=(PROMPT - 14, PROMPT), max_new_tokens=NEW, batch=3)
        with torch.no_grad():
            read(Body(model), kept, texts())
        assert kept.stats()["pools"]["marks"]["resident"] == 1


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clocks that do not go back far enough for the next layer: it begins a token late."""
    back = Clocks.stand_at

    def almost(self: Clocks, before: Sequence[Tensor]) -> None:
        back(self, before)
        self.advance()

    monkeypatch.setattr(Clocks, "stand_at", almost)
    yield


@pytest.mark.parametrize("name", ["h2o", "raas-compressed-prompt"])
def test_a_layer_that_begins_a_token_late_is_caught(name: str, late: None) -> None:
    assert not same(led(small(name), True), led(small(name), False))


def keys_not_found(self: Ahead) -> None:
    """In place of ``leave``: who comes later in the stretch sees the key that lay there at first."""


def values_not_lost(self: Ahead, place: Tensor, value: Tensor) -> None:
    """In place of ``enter``: who came earlier in the stretch reads the value that entered later."""
    self.now_place.copy_(place)
    self.now_lost.zero_()


@pytest.mark.parametrize(
    "name, method, broken",
    [
        ("h2o", "leave", keys_not_found),
        ("quest", "leave", keys_not_found),
        ("h2o", "enter", values_not_lost),
        ("tova", "enter", values_not_lost),
    ],
)
def test_a_stretch_that_forgets_what_entered_is_caught(
    name: str, method: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = led(small(name), True)
    monkeypatch.setattr(Ahead, method, broken)
    assert not same(led(small(name), True), right)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny()[0]
    with applied(model, "h2o"):
        kept = cache_for(model, prompt=4, max_new_tokens=3)
        with pytest.raises(CacheError, match="planned for 3 generated tokens, has 0, and cannot take 4 more"):
            kept.begin(4, kind=GIVEN)


def test_a_cache_goes_with_its_texts() -> None:
    """And not when the garbage is next collected: a batch's slots are gigabytes."""
    gc.disable()
    try:
        found = led(small("h2o"), True, every=4)
        kept = weakref.ref(found[1])
        del found
        assert kept() is None
    finally:
        gc.enable()


def test_the_full_cache_keeps_all_of_the_mass() -> None:
    mass = led(load_policy("dense"), True, every=4)[2]
    assert list(mass) == [1, 5, 9, 13, 17, 21]
    assert all(torch.allclose(by_row, torch.ones(3, dtype=torch.float64)) for by_row in mass.values())


@pytest.mark.parametrize("name", ["h2o", "quest", "duo-attention", "ada-kv"])
def test_the_mass_is_the_same_either_way(name: str) -> None:
    layers, steps = (led(small(name), way, every=3)[2] for way in (True, False))
    assert layers.keys() == steps.keys()
    for place, by_row in layers.items():
        reached = [row for row, text in enumerate(texts()) if place < len(text.output)]
        assert torch.allclose(by_row[reached], steps[place][reached], atol=1e-5)
