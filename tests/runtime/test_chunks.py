"""prompt_chunk: a layer takes a prompt pass in chunks of each row's tokens, an update after each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpolicy.attention import Formula
from kvpolicy.language import loads_policy
from kvpolicy.plan import ModelGeometry, Plan, make_plan
from kvpolicy.plan.timeline import timeline
from kvpolicy.runtime import PolicyCache
from kvpolicy.testing.beside import Beside

GEOMETRY = ModelGeometry("random", layers=2, query_heads=4, kv_heads=2, head_dim=8)
Given = list[tuple[Tensor, Tensor, Tensor]]

POOLS = {
    "sums": "all: {admit: all, budget: 10, scorer: {signal: attention, queries: all, memory: sum}}",
    "pages": "all: {admit: all, page: 4, budget: 16, window: 3, "
    "scorer: {signal: page-bound, hit: {top: 50%}, memory: last-hit}}",
    "survivors": "all: {admit: all, page: 3, budget: 'max(4, 30 - context)', pinned: survivors, "
    "scorer: {signal: attention, queries: {last: 5}, memory: {decay: 0.9}}}",
    "prompt end": "all: {admit: all, budget: 9, pinned: {first: 2}, update: prompt-end, scorer: {signal: random}}",
    "budgets that wait for one another": """
  prompt: {admit: prompt, page: 3, budget: prompt_len // 2 + 3, window: 2, scorer: {signal: attention, norm: mass}}
  generated: {admit: generated, page: 2, budget: 'max(4, 24 - size(prompt))', scorer: {signal: value-norm}}""",
    "marks": """
  marks: {admit: {tokens: special}, page: 3}
  images: {admit: {modality: image}, page: 2, budget: 6, scorer: {signal: attention, queries: all, memory: sum}}
  rest: {admit: all, page: 4, budget: 12, scorer: {signal: attention, hit: {top: 25%}, memory: last-hit}}""",
}


def plan_of(pools: str, chunk: int, **lengths: object) -> Plan:
    return make_plan(
        loads_policy(f"kvpolicy: 1\nname: test\nprompt_chunk: {chunk}\npools:\n  {pools}"), GEOMETRY, **lengths
    )  # type: ignore[arg-type]


class Speaker:
    """Random numbers, and random flags for policies that ask for them."""

    def __init__(self, rows: int, flags: bool = False) -> None:
        self.rows, self.flags, self.random = rows, flags, torch.Generator().manual_seed(0)

    def numbers(self, columns: int) -> Given:
        def some(heads: int) -> Tensor:
            return torch.randn(self.rows, heads, columns, GEOMETRY.head_dim, generator=self.random)

        return [(2 * some(4), some(2), some(2)) for _ in range(GEOMETRY.layers)]

    def prompt(self, beside: Beside, rows: list[int], **how: object) -> None:
        """A pass that brings so many tokens to each row."""
        flags = {}
        if self.flags:
            drawn = torch.rand(2, self.rows, max(rows), generator=self.random) < 0.3
            flags = {"special": drawn[0], "modality": drawn[1].int()}
        beside.feed(self.numbers(max(rows)), padded(rows), kind="prompt", **flags, **how)  # type: ignore[arg-type]

    def say(self, beside: Beside, steps: int) -> None:
        for _ in range(steps):
            beside.feed(self.numbers(1))


def padded(rows: list[int]) -> Tensor:
    return torch.arange(max(rows)) >= max(rows) - torch.tensor(rows)[:, None]


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("pools", POOLS.values(), ids=POOLS.keys())
def test_ragged_rows_and_turns_beside_the_oracle(pools: str, chunk: int) -> None:
    """Also where a turn comes in several passes, and each row's chunks begin anew with each."""
    beside, speaker = Beside(plan_of(pools, chunk, batch=3, prompt=(0, 40), max_new_tokens=20, turns=3)), Speaker(3)
    speaker.flags = "special" in pools
    speaker.prompt(beside, [23, 11, 0])
    speaker.say(beside, 10)
    speaker.prompt(beside, [0, 3, 5], more=True)
    speaker.prompt(beside, [2, 0, 8])
    speaker.say(beside, 10)
    assert beside.cache.stats()["evicted"] > 0 or "survivors" in pools
    assert not beside.agreement.near_ties


def run(plan: Plan, passes: list[tuple[Given, Tensor]], rows: slice = slice(None)) -> tuple[list[Tensor], list[Tensor]]:
    """What each layer keeps in the end, positions [B, K, S] sorted, and the last pass's attention."""
    cache, outputs = PolicyCache(plan), []
    for number, (given, valid) in enumerate(passes):
        valid = valid[rows]
        columns = valid.any(0)  # a row alone has no padding
        prompt = number < len(passes) - 1
        cache.begin(
            int(columns.sum()), valid[:, columns], kind="prompt", more=number < len(passes) - 2
        ) if prompt else cache.begin(1)
        outputs = [
            layer.forward(*(tensor[rows][:, :, columns] for tensor in layers), Formula(0.35))
            for layer, layers in zip(cache.layers, given, strict=True)
        ]
        cache.finish()
    return [cache.positions(layer).sort(-1).values for layer in range(GEOMETRY.layers)], outputs


@pytest.mark.parametrize("pools", [POOLS["sums"], POOLS["pages"]], ids=["sums", "pages"])
def test_a_row_in_a_padded_batch_is_the_row_alone(pools: str) -> None:
    rows, speaker = [17, 5, 11], Speaker(3)
    passes = [(speaker.numbers(17), padded(rows)), (speaker.numbers(1), torch.ones(3, 1, dtype=torch.bool))]
    together, outputs = run(plan_of(pools, 4, batch=3, prompt=(5, 17), max_new_tokens=5), passes)
    for row in range(3):
        alone, own = run(plan_of(pools, 4, prompt=(5, 17), max_new_tokens=5), passes, slice(row, row + 1))
        for layer in range(GEOMETRY.layers):
            assert torch.equal(together[layer][row], alone[layer][0])
            torch.testing.assert_close(outputs[layer][row], own[layer][0])


@pytest.mark.parametrize("pools", [POOLS["sums"], POOLS["pages"]], ids=["sums", "pages"])
def test_chunks_from_the_caller_are_chunks(pools: str) -> None:
    """The whole prompt in one pass, or pass by pass as long as a chunk: the same."""
    speaker, plan = Speaker(1), plan_of(pools, 4, prompt=14, max_new_tokens=5)
    whole, last = speaker.numbers(14), (speaker.numbers(1), torch.ones(1, 1, dtype=torch.bool))
    at_once = run(plan, [(whole, padded([14])), last])
    spans = [slice(start, min(14, start + 4)) for start in range(0, 14, 4)]
    parts = [([tuple(t[:, :, span] for t in layer) for layer in whole], padded([14])[:, span]) for span in spans]
    in_parts = run(plan, [*parts, last])  # type: ignore[list-item]
    for ours, theirs in zip(at_once[0] + at_once[1], in_parts[0] + in_parts[1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_a_prompt_needs_room_for() -> None:
    plan = plan_of("all: {admit: all, budget: 10}", 4, prompt=30, max_new_tokens=5)
    assert plan.layers[0].slots == 11 and plan.prompt_peak == 11 + 11 + 4
    assert plan_of("all: {admit: all, budget: 10}", 64, prompt=30, max_new_tokens=5).prompt_peak == 11 + 30


def test_sizes_are_those_of_a_prompt_that_has_begun() -> None:
    """A budget that shrinks while the prompt is read is largest at its beginning."""
    plan = plan_of("all: {admit: all, budget: 'max(4, 24 - prompt_len)'}", 8, prompt=30, max_new_tokens=5)
    assert plan.layers[0].bound >= 16
    beside, speaker = Beside(plan), Speaker(1)
    speaker.prompt(beside, [30])
    assert beside.cache.stats()["resident"] == 4


def test_the_timeline_counts_what_survives_chunk_by_chunk() -> None:
    pools = "all: {admit: all, budget: 4, window: 2, pinned: survivors}"
    plan = plan_of(pools, 3, prompt=12, max_new_tokens=4)
    (line,) = timeline(plan, plan.layers[0])
    beside, speaker, counted = Beside(plan), Speaker(1), []
    speaker.prompt(beside, [12])
    counted.append(beside.cache.stats()["resident"])
    for _ in range(4):
        speaker.say(beside, 1)
        counted.append(beside.cache.stats()["resident"])
    assert line.resident == counted
    whole = make_plan(
        loads_policy(f"kvpolicy: 1\nname: test\npools:\n  {pools}"), GEOMETRY, prompt=12, max_new_tokens=4
    )
    assert timeline(whole, whole.layers[0])[0].resident != counted
