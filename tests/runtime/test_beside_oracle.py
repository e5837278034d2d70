"""Every shipped policy keeps what the oracle keeps, at every step, in every row, layer and head."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvpolicy.language import Policy, loads_policy
from kvpolicy.plan import ModelGeometry, make_plan, unsupported
from kvpolicy.testing.beside import Beside
from tests.invariants.policies import EVICTING, NAMES, spread, thorough, tight, tight_plan

GEOMETRY = ModelGeometry("random", layers=2, query_heads=4, kv_heads=2, head_dim=8)
POLICIES = {name: tight(name) for name in NAMES}

Draw = Callable[[int, int], list[tuple[Tensor, Tensor, Tensor]]]


def smooth_numbers(seed: int) -> Draw:
    """Normal queries and keys."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        def numbers(heads: int) -> Tensor:
            return torch.randn(rows, heads, columns, GEOMETRY.head_dim, generator=generator)

        return [(2 * numbers(4), numbers(2), numbers(2)) for _ in range(GEOMETRY.layers)]

    return draw


def tied_numbers(seed: int) -> Draw:
    """Few different keys and queries of whole numbers, so that scores tie all the time and float32 is exact."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        def numbers(heads: int) -> Tensor:
            one = torch.randint(-1, 2, (rows, heads, columns, 1), generator=generator).float()
            return one * torch.eye(GEOMETRY.head_dim)[0] * 2

        return [(numbers(4), numbers(2), numbers(2)) for _ in range(GEOMETRY.layers)]

    return draw


def padded(rows: list[int], columns: int) -> Tensor:
    """Left padding: row b brings its last rows[b] columns."""
    return torch.arange(columns) >= columns - torch.tensor(rows)[:, None]


@pytest.mark.parametrize(("name", "numbers"), spread(NAMES, [smooth_numbers, tied_numbers]))
def test_a_padded_batch_of_ragged_rows(name: str, numbers: Callable[[int], Draw]) -> None:
    beside = Beside(make_plan(POLICIES[name], GEOMETRY, batch=3, prompt=(5, 30), max_new_tokens=64))
    draw = numbers(1)
    beside.feed(draw(3, 30), padded([30, 17, 5], 30))
    for _ in range(64):
        beside.feed(draw(3, 1))
    assert beside.agreement.compared >= 65 * 3 * GEOMETRY.layers * GEOMETRY.kv_heads  # chunks are compared too
    assert name not in EVICTING or beside.cache.stats()["evicted"] > 0
    assert len(beside.agreement.near_ties) <= beside.agreement.compared // 200, beside.agreement.summary()


@pytest.mark.parametrize("name", thorough())
def test_later_turns_and_chunked_prompts(name: str) -> None:
    beside = Beside(tight_plan(name, GEOMETRY, batch=2, prompt=(12, 38), max_new_tokens=90, turns=3))
    draw = smooth_numbers(2)
    beside.feed(draw(2, 11), padded([11, 4], 11), more=True)
    beside.feed(draw(2, 7), more=True)
    beside.feed(draw(2, 1), kind="prompt")
    for _ in range(53):
        beside.feed(draw(2, 1))
    beside.feed(draw(2, 9), padded([6, 9], 9))
    for _ in range(21):
        beside.feed(draw(2, 1))
    beside.feed(draw(2, 1), kind="prompt")
    for _ in range(16):
        beside.feed(draw(2, 1))


EVERYTHING_ELSE = {
    "shrinking budget": "budget: max(4, 30 - t // 2)\nwindow: 2\nscorer: {signal: attention}",
    "budget by share of the text": "budget: 25% * context + 3\nwindow: 2\nscorer: {signal: attention-logit}",
    "every third step": "budget: 12\nupdate: {every: 3}\nscorer: {signal: attention, memory: {decay: 0.9}}",
    "prompt end only": "budget: 12\nupdate: prompt-end\nscorer: {signal: attention, queries: all}",
    "survivors": "budget: 14\nwindow: 2\npinned: survivors\nupdate: {every: 8}\nscorer: {signal: key-norm}",
    "growing window": "budget: 20\nwindow: min(12, t)\nscorer: {signal: attention}",
    "window above budget": "budget: 5\nwindow: 5 + t // 20\nscorer: {signal: attention}",
    "max-decay of a norm": "budget: 15\nwindow: 3\nscorer: {signal: attention, norm: max, memory: {max-decay: 0.8}}",
    "recurrence": "budget: 15\nwindow: 3\nscorer: {signal: attention, hit: {above: 0.1}, memory: {recurrence: 0.5}}",
    "smooth and softmax": "budget: 15\nwindow: 3\nscorer: {signal: attention, smooth: {max: 5}, norm: softmax}",
    "mean smoothing and mass": "budget: 15\nwindow: 3\nscorer: {signal: attention, smooth: {mean: 3}, norm: mass}",
    "over candidates": "budget: 15\nwindow: 3\npinned: {first: 2}\n"
    "scorer: {signal: attention, over: candidates, heads: max}",
    "sum of signals": "budget: 15\nwindow: 3\nscorer:\n  sum:\n  - {signal: attention, memory: sum}\n"
    "  - {signal: key-norm, weight: -0.05}\n"
    "  - product: [{signal: value-norm}, {signal: attention, heads: {logits: max}}]",
    "key anchor": "budget: 15\nscorer: {signal: key-anchor, weight: -1}",
    "pages by attention": "page: 3\nbudget: 15\nwindow: 4\nscorer: {signal: attention, memory: sum}",
    "pages by layer": "page: 4\nbudget: 16\npinned: {first: 3}\nevict: {scope: layer}\nscorer: {signal: page-bound}",
    "pages, hits among candidates": "page: 4\nbudget: 22\nupdate: {every: 5}\n"
    "scorer: {signal: attention, over: candidates, hit: {top: 1/3}, memory: last-hit}",
    "tiny": "budget: 1\nscorer: {signal: attention}",
}


def one_pool(answers: str) -> Policy:
    lines = "".join(f"    {line}\n" for line in ["admit: all", *answers.splitlines()])
    return loads_policy(f"kvpolicy: 1\nname: one\npools:\n  all:\n{lines}")


@pytest.mark.parametrize("answers", EVERYTHING_ELSE.values(), ids=EVERYTHING_ELSE.keys())
def test_what_the_shipped_policies_do_not_say(answers: str) -> None:
    plan = make_plan(one_pool(answers), GEOMETRY, batch=2, prompt=(4, 20), max_new_tokens=60, turns=2)
    assert not list(unsupported(plan))
    beside = Beside(plan)
    draw = smooth_numbers(3)
    beside.feed(draw(2, 13), padded([13, 4], 13))
    for _ in range(40):
        beside.feed(draw(2, 1))
    beside.feed(draw(2, 7), padded([3, 7], 7))
    for _ in range(20):
        beside.feed(draw(2, 1))
    assert beside.cache.stats()["evicted"] > 0
    assert len(beside.agreement.near_ties) <= beside.agreement.compared // 200, beside.agreement.summary()


def test_a_pool_that_reads_another_ones_size() -> None:
    policy = loads_policy(
        "kvpolicy: 1\nname: two\npools:\n"
        "  prompt: {admit: prompt, budget: 10, window: 2, update: {every: 6}, scorer: {signal: attention}}\n"
        "  generated:\n    admit: generated\n    page: 2\n    budget: 30 - size(prompt) + seen(prompt) // 10\n"
        "    scorer: {signal: attention, over: pool, memory: sum}\n"
    )
    beside = Beside(make_plan(policy, GEOMETRY, batch=2, prompt=(9, 30), max_new_tokens=60))
    draw = smooth_numbers(4)
    beside.feed(draw(2, 21), padded([21, 9], 21))
    for _ in range(60):
        beside.feed(draw(2, 1))


def test_layers_may_differ() -> None:
    policy = loads_policy(
        "kvpolicy: 1\nname: pyramid\npools:\n"
        "  all: {admit: all, budget: 24 - 8 * layer, window: 3, scorer: {signal: attention, memory: sum}}\n"
        "overrides: [{layers: 0, dense: true}]\n"
    )
    geometry = ModelGeometry("random", layers=3, query_heads=4, kv_heads=2, head_dim=8)
    plan = make_plan(policy, geometry, batch=1, prompt=20, max_new_tokens=30)
    assert [layer.slots for layer in plan.layers] == [50, 17, 9]
    beside, generator = Beside(plan), torch.Generator().manual_seed(0)
    for columns in (20, *[1] * 30):
        shapes = [(1, heads, columns, 8) for heads in (4, 2, 2)]
        beside.feed([tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(3)])  # type: ignore[misc]
