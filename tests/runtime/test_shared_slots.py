"""Heads that share a budget share slots: they keep what the oracle keeps, in as much memory as they keep together."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import kvpolicy
from kvpolicy.attention import Formula, attend_part, attend_shared
from kvpolicy.language import load_policy, loads_policy
from kvpolicy.oracle.pools import Pool, share_out
from kvpolicy.oracle.text import Page
from kvpolicy.plan import ModelGeometry, Plan, make_plan, unsupported
from kvpolicy.runtime.across_heads import stay_across_heads
from kvpolicy.runtime.pool import LAST_KEY, order_keys
from kvpolicy.testing.beside import Beside
from kvpolicy.testing.compiled import CompiledRun
from kvpolicy.testing.live import LiveAgreement
from kvpolicy.testing.models import random_model

MHA = ModelGeometry("random", layers=2, query_heads=3, kv_heads=3, head_dim=8)
GQA = ModelGeometry("random", layers=1, query_heads=4, kv_heads=2, head_dim=8)
WINDOWED = "{signal: attention, queries: {last: 4}, smooth: {max: 3}}"
TEXT = """
kvpolicy: 1
name: shared
pools:
  prompt:
    admit: prompt
    page: {page}
    budget: {budget}
    window: 3
    scorer: {scorer}
    update: prompt-end
    evict: {{scope: across-heads, floor: {floor}}}
  generated: {generated}
"""


def planned(
    geometry: ModelGeometry,
    *,
    budget: str = "9",
    floor: str = "20%",
    page: int = 1,
    scorer: str = WINDOWED,
    generated: str = "{admit: generated}",
    **lengths: object,
) -> Plan:
    text = TEXT.format(page=page, budget=budget, scorer=scorer, floor=floor, generated=generated)
    return make_plan(loads_policy(text, "shared"), geometry, **lengths)  # type: ignore[arg-type]


def drawing(geometry: ModelGeometry, seed: int = 0) -> Callable[[int, int], list[tuple[Tensor, Tensor, Tensor]]]:
    """Random queries, keys and values; some heads look sharper than others, so that heads win unlike numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        def numbers(heads: int) -> Tensor:
            drawn = torch.randn(rows, heads, columns, geometry.head_dim, generator=generator)
            return drawn * torch.linspace(0.5, 2.5, heads)[:, None, None]

        kv = geometry.kv_heads
        return [(numbers(geometry.query_heads), numbers(kv), numbers(kv)) for _ in range(geometry.layers)]

    return draw


def talk(beside: Beside, geometry: ModelGeometry) -> None:
    """A ragged prompt in two chunks, tokens, a turn that one row sits out, tokens."""
    draw = drawing(geometry)
    lengths = torch.tensor([[11], [4], [7]])
    beside.feed(draw(3, 11), torch.arange(11) >= 11 - lengths, more=True)
    beside.feed(draw(3, 5))
    for _ in range(12):
        beside.feed(draw(3, 1))
    beside.feed(draw(3, 6), torch.arange(6) >= 6 - torch.tensor([[6], [0], [2]]))
    for _ in range(8):
        beside.feed(draw(3, 1))


LENGTHS = {"batch": 3, "prompt": (4, 22), "max_new_tokens": 20, "turns": 2}
KINDS = [
    {"floor": "0"},
    {"floor": "20%"},
    {"floor": "1"},
    {"budget": "64"},
    {"budget": "50% * prompt_len"},
    {"page": 2, "budget": "10"},
    {"page": 3, "budget": "13", "scorer": "{signal: page-bound}", "floor": "1/3"},
    {"scorer": "{signal: attention, queries: all, memory: sum}"},
    {"scorer": "{signal: attention, hit: {top: 30%}, over: pool, memory: {recurrence: 1}}"},
    {"scorer": "{signal: random}"},
    {"scorer": "{signal: attention, queries: {last: 4}, norm: mass}"},
]


@pytest.mark.parametrize("geometry", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("said", KINDS, ids=str)
def test_heads_keep_what_the_oracle_keeps(geometry: ModelGeometry, said: dict[str, object]) -> None:
    plan = planned(geometry, **said, **LENGTHS)  # type: ignore[arg-type]
    assert not list(unsupported(plan)) and plan.layers[0].shared
    beside = Beside(plan)
    talk(beside, geometry)
    assert beside.cache.bytes == plan.bytes
    assert (beside.cache.stats()["evicted"] > 0) == (said.get("budget") != "64")


DECIDING = [
    "{admit: generated, budget: 5, scorer: {signal: attention, memory: sum}}",
    "{admit: generated, budget: 5, scorer: {signal: attention, heads: {logits: max}}}",
    "{admit: generated, budget: 6, scorer: {signal: attention-logit, hit: {top: 50%}, memory: last-hit}}",
    "{admit: generated, budget: 6, scorer: {signal: above-average, queries: {last: 3}}, update: {every: 3}}",
    "{admit: generated, budget: 6, scorer: {signal: gumbel-attention, memory: sum}}",
    "{admit: generated, budget: 6, scorer: {signal: attention-logit, queries: {last: 2}, hit: {top: 2/3}}}",
    "{admit: generated, page: 2, budget: 8, scorer: {signal: page-bound}}",
    "{admit: generated, page: 2, read: {top: 4, scorer: {signal: page-bound}}}",
    "{admit: generated, read: {top: 4, scorer: {signal: attention}}}",
    "{admit: generated, budget: 7, scorer: {signal: attention}, read: {top: 4, scorer: {signal: attention}}}",
]


@pytest.mark.parametrize("generated", DECIDING)
def test_scorers_beside_them_see_all_of_the_cache(generated: str) -> None:
    """Probabilities and ranks of generated tokens count the shared ones too."""
    plan = planned(GQA, generated=generated, **LENGTHS)  # type: ignore[arg-type]
    assert not list(unsupported(plan))
    talk(Beside(plan), GQA)


@pytest.mark.parametrize("generated", [DECIDING[0], "{admit: generated}"])
def test_compiled_once(generated: str) -> None:
    """However many tokens each head keeps, one graph for each kind of step serves."""
    run = CompiledRun()
    beside = Beside(planned(GQA, generated=generated, **LENGTHS), generated=run)  # type: ignore[arg-type]
    talk(beside, GQA)
    assert run.graphs == len(beside.cache.moment.kinds)


def test_memory_is_what_heads_keep_together() -> None:
    """Under a budget of a usual size, at most a tenth more than the sum of what is kept, not heads x the most."""
    geometry = ModelGeometry("random", layers=1, query_heads=8, kv_heads=8, head_dim=4)
    plan = planned(geometry, budget="128", scorer=WINDOWED, batch=2, prompt=700, max_new_tokens=1)
    beside, draw = Beside(plan), drawing(geometry)
    beside.feed(draw(2, 700))
    kept = (beside.cache.positions(0) >= 0).sum(-1)
    shared = sum(buffer.bytes for buffer in plan.layers[0].buffers if buffer.name in ("prompt.keys", "prompt.values"))
    token = 2 * 4 * geometry.head_dim
    assert shared <= 1.1 * int(kept.sum()) * token
    assert shared < 0.7 * kept.numel() * int(kept.max()) * token
    assert plan.bytes == beside.cache.bytes


def test_a_longer_plan_keeps_what_is_shared() -> None:
    beside, draw = Beside(planned(GQA, **LENGTHS)), drawing(GQA)  # type: ignore[arg-type]
    beside.feed(draw(3, 16))
    before = beside.cache.positions(0).sort(-1).values
    beside.cache.extend(prompt=(4, 40), max_new_tokens=40)
    assert torch.equal(beside.cache.positions(0).sort(-1).values[..., -before.shape[-1] :], before)
    beside.cache.reset()
    assert beside.cache.stats()["resident"] == 0


def test_generate_gives_heads_unlike_numbers_of_places() -> None:
    """Applied to a model, `generate` says what the model says beside a cache of its own kind, pass by pass."""
    model = random_model("llama")
    policy = load_policy("ada-kv", set={"budget": 8, "window": 3, "kernel": 1})
    ids = torch.randint(2, 97, (2, 21), generator=torch.Generator().manual_seed(1))
    with kvpolicy.applied(model, policy):
        said = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, return_dict_in_generate=True)
        cache = said.past_key_values
        kept = torch.stack([(cache.positions(layer) >= 0).sum(-1) for layer in range(len(cache.layers))])
        assert (kept.amax(-1) > kept.amin(-1)).any() and cache.stats()["evicted"] > 0
        live = LiveAgreement(model, prompt=21, max_new_tokens=12, batch=2)
        chosen = [live.feed(ids)[:, -1].argmax(-1)]
        for column in range(21, 32):
            chosen.append(live.feed(said.sequences[:, column : column + 1])[:, -1].argmax(-1))
    assert torch.equal(torch.stack(chosen, dim=1), said.sequences[:, 21:])


def test_attention_over_shared_slots_is_each_heads_own() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(*shape, 8, generator=generator) for shape in ((2, 3, 2), (2, 10), (2, 10)))
    owner = torch.tensor([[0, 0, 0, 0, 2, 2, -1, -1, -1, -1], [1, 1, 1, 2, 2, 2, 2, 2, 2, 2]])
    out, log_sum = attend_shared(query, keys, values, owner, Formula(0.3))
    hidden = owner[:, None] != torch.arange(3)[:, None]
    each_keys, each_values = (tensor[:, None].expand(-1, 3, -1, -1) for tensor in (keys, values))
    expected = attend_part(query, each_keys, each_values, hidden, Formula(0.3))
    torch.testing.assert_close((out, log_sum), expected)
    assert log_sum[0, 1].isinf().all() and not out[0, 1].any()


@pytest.mark.parametrize("floor", [Fraction(0), Fraction(1, 5), Fraction(1, 2), Fraction(1)])
def test_places_are_shared_out_as_the_oracle_does(floor: Fraction) -> None:
    """Whole-number scores tie within and between heads all the time."""
    generator = torch.Generator().manual_seed(3)
    heads, units = 4, 9
    text = "kvpolicy: 1\nname: one\npools: {all: {admit: all, budget: 4, evict: {scope: across-heads, floor: %s}}}"
    geometry = ModelGeometry("random", layers=1, query_heads=heads, kv_heads=heads, head_dim=2)
    pool = make_plan(loads_policy(text % floor, "one"), geometry, prompt=9, max_new_tokens=1).layers[0].pools[0]
    for _ in range(40):
        score = torch.randint(0, 3, (1, heads, units), generator=generator).float()
        candidate = torch.rand(1, heads, units, generator=generator) < 0.8
        room = torch.randint(0, 5, (1, heads), generator=generator)
        keys = order_keys(score, torch.arange(units).expand_as(score), candidate, LAST_KEY)
        pages = [Page(0, [position], [position]) for position in range(units)]
        each = {head: Pool(pool, False, pages) for head in range(heads)}
        safe = {head: (~candidate[0, head]).numpy() for head in range(heads)}
        scores = {head: score[0, head].numpy() for head in range(heads)}
        expected = share_out(each, safe, scores, {head: int(room[0, head]) for head in range(heads)})
        assert stay_across_heads(keys, candidate, room, floor)[0].tolist() == [expected[head] for head in range(heads)]


@pytest.mark.parametrize(
    ("pools", "reason"),
    [
        ("{all: {admit: all, budget: 9, EVICT}}", "while generating"),
        ("{all: {admit: all, budget: 9, update: prompt-end, EVICT}}", "while generating"),
        ("{a: {admit: prompt, budget: 9, EVICT}, b: {admit: generated}}", "while generating"),
        (
            "{a: {admit: prompt, budget: 9, update: prompt-end, EVICT}, "
            "b: {admit: generated, budget: 9, scorer: {signal: key-norm, hit: {top: 50%}, memory: last-hit}}}",
            "hits of key-norm over the cache beside a",
        ),
    ],
)
def test_what_does_not_run_is_named(pools: str, reason: str) -> None:
    text = "kvpolicy: 1\nname: one\npools: " + pools.replace("EVICT", "evict: {scope: across-heads}")
    plan = make_plan(loads_policy(text, "one"), GQA, prompt=9, max_new_tokens=9)
    assert any(reason in missing for missing in unsupported(plan))
